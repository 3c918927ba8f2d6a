// SPDX-License-Identifier: Apache-2.0
//! x86-64: where things lie in guest memory and how a CPU starts.

pub(crate) mod boot_params;
pub(crate) mod cpuid;
pub(crate) mod layout;
pub(crate) mod mptable;
pub(crate) mod registers;
