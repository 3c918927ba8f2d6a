// SPDX-License-Identifier: Apache-2.0
//! The real agent as PID 1 of fresh namespaces: what it does in a guest, without a virtual machine.
//! Needs root, cgroup v2 and a static busybox; tests that cannot run say why.

mod cgroups;
mod containers;
mod harness;
mod streams;
