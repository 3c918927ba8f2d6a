// SPDX-License-Identifier: Apache-2.0
//! The IOAPIC of a split irqchip (Intel 82093AA): the local APICs are in KVM, this redirection table is here. Each
//! unmasked pin becomes a message that KVM sends when the pin's event fd is signalled. Pins are edge-triggered only.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use crate::arch::layout::{IOAPIC_PINS, LAPIC};
use crate::bus::BusDevice;

const REGISTER_SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
const TABLE: u8 = 0x10;

/// Version 0x11 (no EOI register), index of the last pin in bits 23:16.
const VERSION_VALUE: u32 = 0x11 | ((IOAPIC_PINS as u32 - 1) << 16);
const MASKED: u64 = 1 << 16;
/// Delivery status and remote IRR.
const READ_ONLY: u64 = (1 << 12) | (1 << 14);

/// A message-signalled interrupt (Intel SDM volume 3A, 11.11).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) address: u32,
    pub(crate) data: u32,
}

/// What each pin sends; none: masked.
pub(crate) type Routes = [Option<Message>; IOAPIC_PINS as usize];

/// Called with the new routes whenever they change.
type SetRoutes = Box<dyn Fn(&Routes) + Send>;

pub(crate) struct Ioapic {
    state: Mutex<State>,
}

struct State {
    selected: u8,
    id: u32,
    table: [u64; IOAPIC_PINS as usize],
    routes: Routes,
    set_routes: SetRoutes,
}

impl std::fmt::Debug for Ioapic {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Ioapic").finish_non_exhaustive()
    }
}

/// The registers, for a snapshot.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IoapicState {
    selected: u8,
    id: u32,
    table: [u64; IOAPIC_PINS as usize],
}

impl Ioapic {
    pub(crate) fn save(&self) -> IoapicState {
        let state = self.lock();
        IoapicState {
            selected: state.selected,
            id: state.id,
            table: state.table,
        }
    }

    /// Takes the registers over and tells KVM the routes.
    pub(crate) fn restore(&self, saved: &IoapicState) {
        let mut state = self.lock();
        state.selected = saved.selected;
        state.id = saved.id;
        state.table = saved.table;
        state.routes = saved.table.map(message);
        (state.set_routes)(&state.routes);
    }

    pub(crate) fn new(set_routes: SetRoutes) -> Ioapic {
        Ioapic {
            state: Mutex::new(State {
                selected: 0,
                id: 0,
                table: [MASKED; IOAPIC_PINS as usize],
                routes: [None; IOAPIC_PINS as usize],
                set_routes,
            }),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl BusDevice for Ioapic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let value = match offset {
            REGISTER_SELECT => u32::from(state.selected),
            WINDOW => state.read(),
            _ => 0,
        };
        data.fill(0);
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let mut state = self.lock();
        match offset {
            REGISTER_SELECT => state.selected = bytes[0],
            WINDOW => state.write(u32::from_le_bytes(bytes)),
            _ => {}
        }
    }
}

impl State {
    /// Pin of the selected register, and whether it is the upper half of the entry.
    fn selected_entry(&self) -> Option<(usize, bool)> {
        let index = self.selected.checked_sub(TABLE)?;
        let pin = usize::from(index / 2);
        (pin < self.table.len()).then_some((pin, index % 2 == 1))
    }

    #[allow(clippy::cast_possible_truncation, reason = "the halves of an entry")]
    fn read(&self) -> u32 {
        match self.selected {
            ID | ARBITRATION => self.id,
            VERSION => VERSION_VALUE,
            _ => match self.selected_entry() {
                Some((pin, true)) => (self.table[pin] >> 32) as u32,
                Some((pin, false)) => self.table[pin] as u32,
                None => 0,
            },
        }
    }

    fn write(&mut self, value: u32) {
        if self.selected == ID {
            self.id = value & 0x0f00_0000;
            return;
        }
        let Some((pin, upper)) = self.selected_entry() else {
            return;
        };
        let old = self.table[pin];
        if upper {
            // The kernel writes the upper half first: the route follows with the lower one.
            self.table[pin] = (old & 0xffff_ffff) | (u64::from(value) << 32);
            return;
        }
        let kept = old & (0xffff_ffff_0000_0000 | READ_ONLY);
        self.table[pin] = kept | (u64::from(value) & !READ_ONLY);
        let route = message(self.table[pin]);
        if route != self.routes[pin] {
            self.routes[pin] = route;
            (self.set_routes)(&self.routes);
        }
    }
}

/// The message that a redirection table entry stands for.
#[allow(clippy::cast_possible_truncation, reason = "fields of a few bits")]
fn message(entry: u64) -> Option<Message> {
    if entry & MASKED != 0 {
        return None;
    }
    let vector = entry as u32 & 0xff;
    let delivery_mode = (entry >> 8) as u32 & 0x7;
    let logical = (entry >> 11) as u32 & 1;
    let destination = (entry >> 56) as u32;
    // KVM and Linux as its guest keep APIC id bits 14:8 in entry bits 55:49 (extended destination id).
    let extended = (entry >> 49) as u32 & 0x7f;
    Some(Message {
        address: LAPIC as u32 | (destination << 12) | (extended << 5) | (logical << 2),
        data: vector | (delivery_mode << 8),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn ioapic() -> (Ioapic, Arc<Mutex<Vec<Routes>>>) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let record = seen.clone();
        let set = Box::new(move |routes: &Routes| record.lock().unwrap().push(*routes));
        (Ioapic::new(set), seen)
    }

    fn set(ioapic: &Ioapic, register: u8, value: u32) {
        ioapic.write(REGISTER_SELECT, &[register, 0, 0, 0]);
        ioapic.write(WINDOW, &value.to_le_bytes());
    }

    fn get(ioapic: &Ioapic, register: u8) -> u32 {
        ioapic.write(REGISTER_SELECT, &[register, 0, 0, 0]);
        let mut data = [0; 4];
        ioapic.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn an_unmasked_pin_becomes_a_message() {
        let (ioapic, seen) = ioapic();
        set(&ioapic, TABLE + 11, 3 << 24);
        assert!(seen.lock().unwrap().is_empty());
        set(&ioapic, TABLE + 10, 0x0001_0051);
        assert!(seen.lock().unwrap().is_empty(), "still masked");
        set(&ioapic, TABLE + 10, 0x51);
        set(&ioapic, TABLE + 10, 0x51);
        let routes = seen.lock().unwrap().clone();
        assert_eq!(routes.len(), 1, "only changes are passed on");
        let expected = Message {
            address: 0xfee0_3000,
            data: 0x51,
        };
        assert_eq!(routes[0][5], Some(expected));
        set(&ioapic, TABLE + 10, 0x0001_0051);
        assert_eq!(seen.lock().unwrap()[1][5], None);
    }

    #[test]
    fn registers_read_back_and_strange_ones_do_nothing() {
        let (ioapic, seen) = ioapic();
        assert_eq!(get(&ioapic, VERSION), VERSION_VALUE);
        assert_eq!(get(&ioapic, TABLE), 0x0001_0000);
        set(&ioapic, ID, 0xffff_ffff);
        assert_eq!(get(&ioapic, ID), 0x0f00_0000);
        for register in 0..=255 {
            set(&ioapic, register, 0xffff_ffff);
            get(&ioapic, register);
        }
        ioapic.write(8, &[1; 8]);
        ioapic.read(3, &mut [0; 1]);
        assert!(seen.lock().unwrap().is_empty(), "all ones is masked");
    }
}
