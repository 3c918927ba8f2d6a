// SPDX-License-Identifier: Apache-2.0
//! The file server driven by raw requests.

mod device;
mod hostile;
mod kernel;
mod limits;
mod mounts;
mod semantics;
