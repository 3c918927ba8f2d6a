// SPDX-License-Identifier: Apache-2.0
use serde_json::json;

use super::*;

const HOST: HostFacts = HostFacts {
    cpus: 16,
    memory_mib: 32_001,
    bind_sources: Vec::new(),
};

fn spec(resources: Value, annotations: Value) -> Spec {
    serde_json::from_value(json!({
        "ociVersion": "1.0.0",
        "linux": {"resources": resources},
        "annotations": annotations,
    }))
    .unwrap()
}

fn plan(resources: Value, annotations: Value, platforms: Value) -> Result<VmShape, PlanError> {
    let spec = spec(resources, annotations);
    let platforms = platforms.as_object().unwrap();
    shape(&spec, platforms, &HOST, &mut Warnings::default())
}

#[test]
fn processors() {
    for (cpu, vcpus) in [
        (json!({}), 4),
        (json!({"quota": 100_000, "period": 100_000}), 1),
        (json!({"quota": 1}), 1),
        (json!({"quota": 100_001}), 2),
        (json!({"quota": 250_000, "period": 100_000}), 3),
        (json!({"quota": 800_000}), 8),
        (json!({"quota": i64::MAX}), 16),
        (json!({"quota": i64::MAX, "period": 1}), 16),
        (json!({"quota": -1}), 4),
        (json!({"cpus": "0-1"}), 2),
        (json!({"cpus": "0-9"}), 4),
        (json!({"cpus": "3", "quota": 800_000}), 1),
        (json!({"cpus": "0-4294967295"}), 4),
    ] {
        let shape = plan(json!({"cpu": cpu}), json!({}), json!({})).unwrap();
        assert_eq!(shape.vcpus, vcpus, "{cpu}");
    }
    let small = HostFacts { cpus: 2, ..HOST };
    let shape = shape(
        &spec(json!({}), json!({})),
        &Map::new(),
        &small,
        &mut Warnings::default(),
    );
    assert_eq!(shape.unwrap().vcpus, 2);
}

#[test]
fn memory_of_the_vm() {
    let mib = 1u64 << 20;
    for (resources, memory) in [
        (json!({}), 1024),
        (json!({"memory": {"limit": -1}}), 1024),
        (json!({"memory": {"limit": 0}}), 1024),
        (json!({"memory": {"limit": 4 * mib}}), 96),
        (json!({"memory": {"limit": 512 * mib}}), 576),
        (json!({"memory": {"limit": 512 * mib + 1}}), 578),
        (json!({"memory": {"limit": i64::MAX}}), 32_000),
        (json!({"unified": {"memory.max": "536870912"}}), 576),
        (json!({"unified": {"memory.max": "max"}}), 1024),
    ] {
        let shape = plan(resources.clone(), json!({}), json!({})).unwrap();
        assert_eq!(shape.memory_mib, memory, "{resources}");
    }
    let error = plan(json!({"memory": {"limit": 1000}}), json!({}), json!({})).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("linux.resources.memory.limit: 1000 bytes are too little")
    );
}

#[test]
fn annotations_and_the_vm_section() {
    let annotated =
        json!({"io.sandbox.vm.memory_mib": "255", "io.sandbox.vm.vcpus": "7", "other": "x"});
    let section =
        json!({"vm": {"hwConfig": {"vcpus": 3, "memory": 200 << 20}, "kernel": {"path": ""}}});
    let shape = |memory_mib, vcpus| Ok(VmShape { vcpus, memory_mib });
    assert_eq!(plan(json!({}), annotated.clone(), json!({})), shape(256, 7));
    assert_eq!(plan(json!({}), json!({}), section.clone()), shape(200, 3));
    assert_eq!(plan(json!({}), annotated, section), shape(256, 7));
    let go = json!({"vm": {"hwconfig": {"vcpus": 0, "memory": 0, "dtdevs": null, "irqs": []},
                           "hypervisor": {"path": "", "parameters": []}}});
    assert_eq!(plan(json!({}), json!({}), go), shape(1024, 4));
    for (annotations, platforms, expected) in [
        (
            json!({"io.sandbox.vm.memory_mib": "95"}),
            json!({}),
            "io.sandbox.vm.memory_mib: 95",
        ),
        (
            json!({"io.sandbox.vm.memory_mib": "99999999"}),
            json!({}),
            "io.sandbox.vm.memory_mib: ",
        ),
        (
            json!({"io.sandbox.vm.memory_mib": "-1"}),
            json!({}),
            "annotations[io.sandbox.vm.memory_mib]: ",
        ),
        (
            json!({"io.sandbox.vm.vcpus": "0"}),
            json!({}),
            "annotations[io.sandbox.vm.vcpus]: ",
        ),
        (
            json!({"io.sandbox.vm.vcpus": "33"}),
            json!({}),
            "annotations[io.sandbox.vm.vcpus]: ",
        ),
        (
            json!({"io.sandbox.vm.kernel": "/k"}),
            json!({}),
            "annotations[io.sandbox.vm.kernel]: not supported",
        ),
        (json!({}), json!({"vm": []}), "vm: is not an object"),
        (
            json!({}),
            json!({"vm": {"hypervisor": {"path": "/h"}}}),
            "vm.hypervisor: not supported",
        ),
        (
            json!({}),
            json!({"vm": {"kernel": {"path": "/k"}}}),
            "vm.kernel: not supported",
        ),
        (
            json!({}),
            json!({"vm": {"image": {"path": "/i", "format": "raw"}}}),
            "vm.image: not supported",
        ),
        (
            json!({}),
            json!({"vm": {"hwConfig": {"irqs": [5]}}}),
            "vm.hwConfig.irqs: not supported",
        ),
        (
            json!({}),
            json!({"vm": {"hwConfig": {"vcpus": 99}}}),
            "vm.hwConfig.vcpus: ",
        ),
        (
            json!({}),
            json!({"vm": {"hwConfig": {"memory": "x"}}}),
            "vm.hwConfig.memory: ",
        ),
    ] {
        let error = plan(json!({}), annotations, platforms)
            .unwrap_err()
            .to_string();
        assert!(error.starts_with(expected), "{error}");
    }
}

#[test]
fn other_platforms() {
    let mut warnings = Warnings::default();
    let platforms = json!({"windows": {}, "solaris": {}});
    let platforms = platforms.as_object().unwrap();
    assert!(refuse_platforms(platforms, true, &mut warnings).is_ok());
    assert_eq!(warnings.0.len(), 2);
    let error = refuse_platforms(platforms, false, &mut warnings)
        .unwrap_err()
        .to_string();
    assert!(error.contains("only Linux containers"), "{error}");
}
