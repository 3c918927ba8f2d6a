// SPDX-License-Identifier: Apache-2.0
//! Network interfaces: the loopback one, and the cards that the host plugs.

use std::fs;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use agent_protocol::{Address, Card, ErrorKind, Neighbour, Route};
use rustix::io::Errno;
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use rustix::process::Pid;

use crate::child::NEW_NETWORK;
use crate::error::{Result, Stage, Within, error, refused};
use crate::netlink::{Message, Socket};
use crate::syscalls::set_namespaces;

/// IFNAMSIZ without the NUL at the end.
const MAX_NAME: usize = 15;

/// rtnetlink.h.
const RTNH_F_ONLINK: u32 = 4;

const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio/bind";
const DEVICES: &str = "/sys/bus/platform/devices";

/// Sets `lo` of the current network namespace up; the kernel gives it its addresses.
pub(crate) fn loopback_up() -> rustix::io::Result<()> {
    // ioctl(2) on interfaces works on any socket, and a Unix one is always compiled in.
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    crate::syscalls::loopback_up(socket.as_fd())
}

/// A process in whose network namespace cards go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) pid: Pid,
    pub(crate) pidfd: BorrowedFd<'a>,
}

/// Gives plugged cards their driver, name, addresses and routes, in the network namespace of the process `target`, or in
/// the agent's own. `own` is the agent.
pub(crate) fn configure(
    cards: &[Card],
    target: Option<Target<'_>>,
    own: BorrowedFd<'_>,
) -> Result<()> {
    for card in cards {
        if card.name.is_empty() || card.name.len() > MAX_NAME || card.name.contains(['/', '\0']) {
            return Err(refused(format!(
                "network card {:?}: invalid name",
                card.name
            )));
        }
        let given = bind(card.slot).within(format_args!("network card {}", card.name))?;
        Socket::open()
            .and_then(|socket| rename(&socket, &given, card, target))
            .stage(format_args!("network card {}: name", card.name))?;
    }
    let Some(target) = target else {
        return address(cards);
    };
    set_namespaces(target.pidfd, NEW_NETWORK).stage("enter the network namespace")?;
    let done = address(cards);
    if let Err(errno) = set_namespaces(own, NEW_NETWORK) {
        // Containers to come would be given their cards there.
        log::error!("leave the network namespace: {errno}");
        crate::power::restart();
    }
    done
}

/// At boot the slot was empty, and the driver left it alone. Returns the name of the new interface.
fn bind(slot: u8) -> Result<String> {
    let device = format!("virtio-mmio.{slot}");
    fs::write(DRIVER, &device).stage(format_args!("bind {device}"))?;
    let interface = || -> std::io::Result<Option<String>> {
        for entry in fs::read_dir(Path::new(DEVICES).join(&device))? {
            let entry = entry?;
            if !entry.file_name().to_string_lossy().starts_with("virtio") {
                continue;
            }
            if let Some(interface) = fs::read_dir(entry.path().join("net"))?.next() {
                return Ok(interface?.file_name().into_string().ok());
            }
        }
        Ok(None)
    };
    let missing = || error(ErrorKind::System, format!("{device}: no network interface"));
    interface()
        .stage(format_args!("find {device}"))?
        .ok_or_else(missing)
}

fn rename(
    socket: &Socket,
    given: &str,
    card: &Card,
    target: Option<Target<'_>>,
) -> rustix::io::Result<()> {
    if given == card.name && target.is_none() {
        return Ok(());
    }
    let mut message = Message::set_link(name_to_index(socket, given)?, false);
    message.text(libc::IFLA_IFNAME, &card.name);
    if let Some(target) = target {
        message.number(
            libc::IFLA_NET_NS_PID,
            target.pid.as_raw_pid().unsigned_abs(),
        );
    }
    socket.call(message)
}

fn address(cards: &[Card]) -> Result<()> {
    let socket = Socket::open().stage("netlink")?;
    for card in cards {
        configure_one(&socket, card).within(format_args!("network card {}", card.name))?;
    }
    Ok(())
}

fn configure_one(socket: &Socket, card: &Card) -> Result<()> {
    let index = name_to_index(socket, &card.name).stage("find")?;
    if !card.ipv6 {
        let file = format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", card.name);
        fs::write(file, "1").stage("disable IPv6")?;
    }
    if card.up {
        socket
            .call(Message::set_link(index, true))
            .stage("set up")?;
    }
    for address in &card.addresses {
        socket
            .call(new_address(index, address))
            .field(format_args!(
                "address {}/{}",
                address.address, address.prefix
            ))?;
    }
    for route in &card.routes {
        match socket.call(new_route(index, route)) {
            // Made by the kernel, for an address.
            Err(Errno::EXIST) => {}
            result => result.field(format_args!("route {}/{}", route.destination, route.prefix))?,
        }
    }
    for neighbour in &card.neighbours {
        socket
            .call(new_neighbour(index, neighbour))
            .field(format_args!("neighbour {}", neighbour.address))?;
    }
    Ok(())
}

fn family(address: &IpAddr) -> u8 {
    let family = match address {
        IpAddr::V4(_) => libc::AF_INET,
        IpAddr::V6(_) => libc::AF_INET6,
    };
    family as u8
}

fn new_address(index: u32, plan: &Address) -> Message {
    // No other host is asked whether it has the address: who gave it has seen to that.
    let flags = match plan.address {
        IpAddr::V4(_) => 0,
        IpAddr::V6(_) => libc::IFA_F_NODAD as u8,
    };
    // struct ifaddrmsg.
    let mut header = vec![family(&plan.address), plan.prefix, flags, plan.scope];
    header.extend(index.to_ne_bytes());
    let mut message = Message::create(libc::RTM_NEWADDR, &header);
    message.address(libc::IFA_LOCAL, plan.address);
    message.address(libc::IFA_ADDRESS, plan.peer.unwrap_or(plan.address));
    if let Some(broadcast) = plan.broadcast {
        message.address(libc::IFA_BROADCAST, broadcast.into());
    }
    message
}

fn new_route(index: u32, plan: &Route) -> Message {
    let flags = if plan.on_link { RTNH_F_ONLINK } else { 0 };
    // struct rtmsg: family, lengths of destination and source, TOS, table, protocol, scope, type, flags.
    let mut header = vec![
        family(&plan.destination),
        plan.prefix,
        0,
        0,
        libc::RT_TABLE_MAIN,
        libc::RTPROT_BOOT,
        plan.scope,
        libc::RTN_UNICAST,
    ];
    header.extend(flags.to_ne_bytes());
    let mut message = Message::create(libc::RTM_NEWROUTE, &header);
    if plan.prefix > 0 {
        message.address(libc::RTA_DST, plan.destination);
    }
    message.number(libc::RTA_OIF, index);
    if let Some(gateway) = plan.gateway {
        message.address(libc::RTA_GATEWAY, gateway);
    }
    if let Some(source) = plan.source {
        message.address(libc::RTA_PREFSRC, source);
    }
    if plan.metric > 0 {
        message.number(libc::RTA_PRIORITY, plan.metric);
    }
    message
}

fn new_neighbour(index: u32, plan: &Neighbour) -> Message {
    // struct ndmsg: family, padding, index, state, flags, type.
    let mut header = vec![family(&plan.address), 0, 0, 0];
    header.extend(index.to_ne_bytes());
    header.extend(libc::NUD_PERMANENT.to_ne_bytes());
    header.extend([0, 0]);
    let mut message = Message::replace(libc::RTM_NEWNEIGH, &header);
    message.address(libc::NDA_DST, plan.address);
    message.bytes(libc::NDA_LLADDR, &plan.mac);
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What strace(1) shows of ip(8) for the same commands, attributes sorted as here.
    #[test]
    fn messages_are_those_of_ip() {
        let address = new_address(
            3,
            &Address {
                address: "10.1.2.3".parse().unwrap(),
                prefix: 24,
                peer: None,
                broadcast: Some("10.1.2.255".parse().unwrap()),
                scope: 0,
            },
        );
        let mut expected = vec![libc::AF_INET as u8, 24, 0, 0, 3, 0, 0, 0];
        for (kind, value) in [(2, [10, 1, 2, 3]), (1, [10, 1, 2, 3]), (4, [10, 1, 2, 255])] {
            expected.extend([8, 0, kind, 0]);
            expected.extend(value);
        }
        assert_eq!(address.body(), expected);

        let route = new_route(
            3,
            &Route {
                destination: "0.0.0.0".parse().unwrap(),
                prefix: 0,
                gateway: Some("10.1.2.1".parse().unwrap()),
                source: None,
                metric: 0,
                scope: 0,
                on_link: true,
            },
        );
        let mut expected = vec![libc::AF_INET as u8, 0, 0, 0, 254, 3, 0, 1, 4, 0, 0, 0];
        expected.extend([8, 0, 4, 0, 3, 0, 0, 0, 8, 0, 5, 0, 10, 1, 2, 1]);
        assert_eq!(route.body(), expected);

        let neighbour = new_neighbour(
            3,
            &Neighbour {
                address: "10.1.2.1".parse().unwrap(),
                mac: [2, 0, 0, 0, 0, 1],
            },
        );
        let mut expected = vec![libc::AF_INET as u8, 0, 0, 0, 3, 0, 0, 0, 0x80, 0, 0, 0];
        expected.extend([8, 0, 1, 0, 10, 1, 2, 1, 10, 0, 2, 0, 2, 0, 0, 0, 0, 1, 0, 0]);
        assert_eq!(neighbour.body(), expected);
    }

    #[test]
    fn names_that_are_paths_are_refused() {
        let card = |name: &str| Card {
            slot: 4,
            name: name.into(),
            up: true,
            ipv6: true,
            addresses: Vec::new(),
            routes: Vec::new(),
            neighbours: Vec::new(),
        };
        for name in ["", "../all", "sixteen-letters-"] {
            let own = fs::File::open("/dev/null").unwrap();
            let error = configure(&[card(name)], None, own.as_fd()).unwrap_err();
            assert_eq!(
                error.message,
                format!("network card {name:?}: invalid name")
            );
        }
    }
}
