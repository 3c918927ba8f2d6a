// SPDX-License-Identifier: Apache-2.0
//! Log lines that a guest can cause are limited: a guest must not fill the host's disk.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// At most this many lines of one place in [`PERIOD`].
const BURST: u32 = 10;
const PERIOD: Duration = Duration::from_secs(5);

/// How often one place in the code may log.
#[derive(Debug)]
pub(crate) struct Limit {
    window: Mutex<Option<(Instant, u32)>>,
}

impl Limit {
    pub(crate) const fn new() -> Limit {
        Limit {
            window: Mutex::new(None),
        }
    }

    pub(crate) fn allows(&self) -> bool {
        let mut window = self
            .window
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let now = Instant::now();
        match window.as_mut() {
            Some((start, lines)) if now.duration_since(*start) < PERIOD => {
                *lines = lines.saturating_add(1);
                *lines <= BURST
            }
            _ => {
                *window = Some((now, 1));
                true
            }
        }
    }
}

/// `log::warn!`, at most ten lines in five seconds from one place. Compulsory wherever a guest can trigger the line.
macro_rules! warn_limited {
    ($($arguments:tt)+) => {{
        static LIMIT: $crate::logging::Limit = $crate::logging::Limit::new();
        if LIMIT.allows() {
            log::warn!($($arguments)+);
        }
    }};
}
pub(crate) use warn_limited;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut() {
        let limit = Limit::new();
        let allowed = (0..1000).filter(|_| limit.allows()).count();
        assert_eq!(allowed, BURST as usize);
    }
}
