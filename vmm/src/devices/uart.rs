// SPDX-License-Identifier: Apache-2.0
//! The boot console: the transmit half of a 16550, always ready. What the guest prints is kept for error messages.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::sync::Mutex;

/// Line status register: transmitter empty, holding register empty.
const LINE_STATUS: u16 = 5;
const TRANSMITTER_READY: u8 = 0x60;
/// Line control register, whose top bit turns the first two registers into the divisor latch.
const LINE_CONTROL: u16 = 3;
const DIVISOR_LATCH: u8 = 0x80;

/// How much of the guest's output is kept.
const KEPT: usize = 4096;

#[derive(Debug, Default)]
pub(crate) struct Uart {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    line_control: u8,
    output: VecDeque<u8>,
    echo: Option<File>,
}

impl Uart {
    pub(crate) fn read(&self, register: u16) -> u8 {
        match register {
            LINE_STATUS => TRANSMITTER_READY,
            LINE_CONTROL => self.lock().line_control,
            _ => 0,
        }
    }

    pub(crate) fn write(&self, register: u16, value: u8) {
        let mut state = self.lock();
        match register {
            0 if state.line_control & DIVISOR_LATCH == 0 => {
                if state.output.len() == KEPT {
                    state.output.pop_front();
                }
                state.output.push_back(value);
                if let Some(echo) = &mut state.echo {
                    // For whoever debugs a boot: nothing depends on it.
                    let _ = echo.write_all(&[value]);
                }
            }
            LINE_CONTROL => state.line_control = value,
            _ => {}
        }
    }

    /// Writes all further output to `file` too.
    pub(crate) fn echo(&self, file: File) {
        self.lock().echo = Some(file);
    }

    /// The last output, printable ASCII only: the guest's bytes go to terminals and logs.
    pub(crate) fn tail(&self) -> String {
        let state = self.lock();
        state
            .output
            .iter()
            .filter(|byte| **byte != b'\r')
            .map(|byte| match byte {
                b'\n' => '\n',
                b' '..=b'~' => char::from(*byte),
                _ => '.',
            })
            .collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_last_bytes_and_hides_control_characters() {
        let uart = Uart::default();
        for byte in b"x".iter().chain([b'a'; KEPT - 5].iter()) {
            uart.write(0, *byte);
        }
        for byte in b"b\x1b[\r\nc" {
            uart.write(0, *byte);
        }
        let tail = uart.tail();
        assert!(tail.starts_with('a') && tail.ends_with("b.[\nc"), "{tail}");
    }

    #[test]
    fn the_divisor_is_not_output() {
        let uart = Uart::default();
        uart.write(LINE_CONTROL, DIVISOR_LATCH | 3);
        uart.write(0, b'x');
        uart.write(LINE_CONTROL, 3);
        assert_eq!(uart.tail(), "");
        assert_eq!(uart.read(LINE_STATUS), TRANSMITTER_READY);
    }
}
