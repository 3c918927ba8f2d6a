// SPDX-License-Identifier: Apache-2.0
//! `events`: statistics at an interval, and each out-of-memory kill, one JSON object a line.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Error, live, print};
use crate::channel::{self, wait_for_any};
use crate::cli::Events;
use crate::control::{self, Client, Reply, Request};
use crate::stats::stats;
use crate::store::Store;

pub fn run(store: &Store, arguments: &Events) -> Result<u8, Error> {
    let id = &arguments.id;
    store.load(id)?.status().is_live()?;
    if arguments.stats {
        print_event("stats", id, Some(usage(&mut live::connect(store, id)?)?))?;
        return Ok(0);
    }
    if arguments.interval.is_zero() {
        return Err(Error::Interval);
    }
    let mut events = live::connect(store, id)?;
    events.send(&Request::Events, &[])?;
    let mut questions = live::connect(store, id)?;
    match follow(id, arguments.interval, &mut events, &mut questions) {
        // The container has ended.
        Err(Error::Control(control::Error::Channel(channel::Error::Closed))) => Ok(0),
        Err(error) => Err(error),
        Ok(never) => match never {},
    }
}

fn follow(
    id: &str,
    interval: Duration,
    events: &mut Client,
    questions: &mut Client,
) -> Result<std::convert::Infallible, Error> {
    let mut next = Instant::now() + interval;
    loop {
        while let Some(reply) = events.poll()? {
            if matches!(reply, Reply::OutOfMemory) {
                print_event("oom", id, None)?;
            }
        }
        if Instant::now() >= next {
            print_event("stats", id, Some(usage(questions)?))?;
            next = Instant::now() + interval;
        }
        match wait_for_any(&[events.as_fd()], Some(next)) {
            Ok(()) | Err(channel::Error::TimedOut) => {}
            Err(error) => return Err(Error::Wait(error)),
        }
    }
}

fn usage(client: &mut Client) -> Result<Value, Error> {
    match client.ask(&Request::Usage, live::guest_deadline())? {
        Reply::Usage(usage) => Ok(stats(&usage)),
        _ => Err(control::Error::OutOfTurn.into()),
    }
}

fn print_event(kind: &str, id: &str, data: Option<Value>) -> Result<(), Error> {
    let mut event = json!({ "type": kind, "id": id });
    if let (Some(data), Some(event)) = (data, event.as_object_mut()) {
        event.insert("data".to_owned(), data);
    }
    print(&format!("{event}\n"))
}
