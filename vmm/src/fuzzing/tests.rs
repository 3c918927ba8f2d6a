// SPDX-License-Identifier: Apache-2.0
//! The targets with bytes that nothing guides: a generator that can be repeated is enough to see that they run.

type Target = fn(&[u8]);

/// `inputs` pseudo-random inputs, mostly of small numbers.
fn survives(target: Target, inputs: usize) {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut random = move |limit: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        u8::try_from(state % limit).unwrap()
    };
    for _ in 0..inputs {
        let length = usize::from(random(256)) * 4;
        let bytes: Vec<u8> = (0..length)
            .map(|_| match random(4) {
                0 => random(256),
                _ => random(16),
            })
            .collect();
        target(&bytes);
    }
}

#[test]
fn devices_survive_noise() {
    survives(super::registers, 200);
    survives(super::rng, 200);
    survives(super::balloon, 200);
    survives(super::vsock, 200);
    survives(super::file_system_device, 50);
    survives(super::uart, 200);
    survives(super::ioapic, 200);
}

#[test]
fn chains_and_snapshots_survive_noise() {
    survives(super::descriptor_chains, 1000);
    survives(super::snapshot, 1000);
}

#[test]
fn file_server_survives_noise() {
    survives(super::file_system_requests, 50);
}
