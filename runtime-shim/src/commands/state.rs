// SPDX-License-Identifier: Apache-2.0
//! `state`: what is known of a container, as JSON.

use super::{Error, print};
use crate::store::Store;

pub fn run(store: &Store, id: &str) -> Result<u8, Error> {
    let state = store.load(id)?;
    let text = super::json(&state.oci(state.status()))?;
    print(&text)?;
    Ok(0)
}
