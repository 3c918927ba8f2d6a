// SPDX-License-Identifier: Apache-2.0
//! A drop-in for containers.conf(5).

/// Podman knows what a runtime can do by its name. A list in a drop-in takes the place of the default
/// one, which is repeated for that reason.
pub fn text(program: &str) -> String {
    format!(
        "# Written by `sandbox install --engine podman`; `sandbox uninstall --engine podman` removes it.\n\
         [engine]\n\
         runtime_supports_json = [\"crun\", \"runc\", \"kata\", \"runsc\", \"youki\", \"krun\", \"sandbox\"]\n\
         runtime_supports_kvm = [\"kata\", \"kata-runtime\", \"kata-qemu\", \"kata-fc\", \"krun\", \"sandbox\"]\n\
         runtime_supports_nocgroups = [\"crun\", \"krun\", \"sandbox\"]\n\
         \n\
         [engine.runtimes]\n\
         sandbox = [\"{program}\"]\n"
    )
}
