// SPDX-License-Identifier: Apache-2.0
//! Joins the links of a container's network namespace with its guest: for each link a tap beside it, and traffic control
//! that moves every frame that arrives at one to the other. What the link is and has (addresses, routes) goes to the
//! guest.
//!
//! A tap goes when its descriptor is closed. The ingress qdisc of the link stays then, so it is marked: [`release`]
//! removes it once its tap is gone.

mod netlink;
mod tap;

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use agent_protocol::{Address, Card, Neighbour, Route};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType,
    LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType};
use serde::{Deserialize, Serialize};
use vmm::NETWORK_CARDS;

use netlink::Socket;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("network: {0}")]
    Step(&'static str, #[source] io::Error),
    #[error("network link {0}: {1}")]
    Link(String, &'static str, #[source] io::Error),
    #[error("network link {0}: is joined to another container already")]
    Taken(String),
    #[error("network link {0}: has an ingress qdisc of its own, which has to be deleted")]
    ForeignQdisc(String),
    #[error("network namespace: has {0} links, and a container at most {NETWORK_CARDS}")]
    TooMany(usize),
    #[error("network namespace {path}", path = .0.display())]
    Namespace(PathBuf, #[source] io::Error),
}

/// A link as the guest is to see it. Its tap comes beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joined {
    /// The slot is given later.
    pub card: Card,
    pub mac: [u8; 6],
    pub mtu: u16,
}

/// Joins all links of the network namespace of this thread, or none. Not the ones that have been joined `before`.
pub fn join(before: bool) -> Result<Vec<(Joined, OwnedFd)>, Error> {
    let mut socket = Socket::open().map_err(|error| Error::Step("netlink", error))?;
    let links = socket
        .links()
        .map_err(|error| Error::Step("list links", error))?;
    let found: Vec<&LinkMessage> = links.iter().filter(|link| is_joinable(link)).collect();
    if found.len() > NETWORK_CARDS {
        return Err(Error::TooMany(found.len()));
    }
    let is_joined = |link: &LinkMessage| {
        let tap = tap_name(link.header.index);
        links.iter().any(|other| name(other) == tap)
    };
    let mut wanted = Vec::new();
    for link in found {
        match (is_joined(link), before) {
            (false, _) => wanted.push(link),
            (true, true) => {}
            (true, false) => return Err(Error::Taken(name(link).to_owned())),
        }
    }
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let everything = Everything::read(&mut socket)?;
    let joined: Result<Vec<_>, Error> = wanted
        .into_iter()
        .map(|link| Ok((everything.describe(link), join_one(&mut socket, link)?)))
        .collect();
    if joined.is_err() {
        // The taps are closed by now.
        let _ = release_here();
    }
    joined
}

/// What is left of joins whose containers are gone goes.
fn release_here() -> io::Result<()> {
    let mut socket = Socket::open()?;
    let links = socket.links()?;
    for link in links.iter().filter(|link| is_joinable(link)) {
        let tap = tap_name(link.header.index);
        let abandoned = !links.iter().any(|other| name(other) == tap);
        if abandoned && socket.has_redirect(link.header.index)? {
            socket.remove_ingress(link.header.index)?;
        }
    }
    Ok(())
}

/// Cleans the namespace at `path` of what containers that are gone have left. A namespace that is gone itself is clean.
pub fn release(path: &Path) {
    let Ok(namespace) = File::open(path) else {
        return;
    };
    let enter = || {
        let kind = Some(LinkNameSpaceType::Network);
        rustix::thread::move_into_link_name_space(namespace.as_fd(), kind)
    };
    let released = elsewhere(enter, || {
        release_here().map_err(|error| Error::Step("clean links", error))
    });
    if let Err(error) = released {
        log::warn!("{}", crate::commands::chain(&error));
    }
}

/// Joins the links that came to the network namespace of a process since its own were.
pub fn join_for(process: BorrowedFd<'_>) -> Result<Vec<(Joined, OwnedFd)>, Error> {
    let enter =
        || rustix::thread::move_into_thread_name_spaces(process, ThreadNameSpaceType::NETWORK);
    elsewhere(enter, || join(true))
}

/// Acts in another network namespace, in a thread of its own: this one stays where it is.
fn elsewhere<T: Send>(
    enter: impl FnOnce() -> rustix::io::Result<()> + Send,
    act: impl FnOnce() -> Result<T, Error> + Send,
) -> Result<T, Error> {
    let run = || {
        enter().map_err(|error| Error::Step("enter the namespace", error.into()))?;
        act()
    };
    std::thread::scope(|scope| {
        let spawned = std::thread::Builder::new().spawn_scoped(scope, run);
        let thread = spawned.map_err(|error| Error::Step("thread", error))?;
        let panicked = |_| Error::Step("thread", io::Error::other("ended in a panic"));
        thread.join().map_err(panicked)?
    })
}

/// Whatever carries Ethernet frames and belongs to nothing else in the namespace.
fn is_joinable(link: &LinkMessage) -> bool {
    let header = &link.header;
    let up = header.flags.contains(LinkFlags::Up);
    let fallback_of_tunnels = matches!(
        kind(link),
        Some(InfoKind::GreTap | InfoKind::GreTap6 | InfoKind::ErSpan | InfoKind::Ip6ErSpan)
    ) && !up;
    let part_of_another = link
        .attributes
        .iter()
        .any(|attribute| matches!(attribute, LinkAttribute::Controller(_)));
    header.link_layer_type == LinkLayerType::Ether
        && !header.flags.contains(LinkFlags::Loopback)
        && !part_of_another
        && !fallback_of_tunnels
        && !name(link).starts_with(TAP)
}

fn kind(link: &LinkMessage) -> Option<&InfoKind> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => infos.iter().find_map(|info| match info {
                LinkInfo::Kind(kind) => Some(kind),
                _ => None,
            }),
            _ => None,
        })
}

fn name(link: &LinkMessage) -> &str {
    let found = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.as_str()),
            _ => None,
        });
    found.unwrap_or_default()
}

fn mtu(link: &LinkMessage) -> u16 {
    let found = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(*mtu),
            _ => None,
        });
    u16::try_from(found.unwrap_or(1500)).unwrap_or(u16::MAX)
}

fn mac(link: &LinkMessage) -> [u8; 6] {
    let found = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Address(address) => address.as_slice().try_into().ok(),
            _ => None,
        });
    found.unwrap_or_default()
}

fn has_ipv6(link: &LinkMessage) -> bool {
    let inet6 = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::AfSpecUnspec(families) => {
                families.iter().find_map(|family| match family {
                    AfSpecUnspec::Inet6(inet6) => Some(inet6),
                    _ => None,
                })
            }
            _ => None,
        });
    // A host without IPv6 says nothing of it.
    inet6.is_some_and(|inet6| {
        !inet6.iter().any(|part| match part {
            AfSpecInet6::DevConf(configuration) => configuration.disable_ipv6 != 0,
            _ => false,
        })
    })
}

/// Taps of links are named after the index of their link: so a link cannot be joined twice.
const TAP: &str = "sandbox-";

fn tap_name(link: u32) -> String {
    // 15 bytes are what a name may have. Indices above that are those of no namespace in practice; they would only show
    // as an error of the tap's creation.
    format!("{TAP}{link:x}")
}

/// Makes the tap and lets frames go both ways.
fn join_one(socket: &mut Socket, link: &LinkMessage) -> Result<OwnedFd, Error> {
    let at = |step| move |error| Error::Link(name(link).to_owned(), step, error);
    let index = link.header.index;
    let tap_name = tap_name(index);
    let tap = tap::open(&tap_name).map_err(|error| match error.kind() {
        io::ErrorKind::ResourceBusy => Error::Taken(name(link).to_owned()),
        _ => at("make a tap")(error),
    })?;
    let tap_index = socket.index(&tap_name).map_err(at("find its tap"))?;
    socket
        .prepare_tap(tap_index, mtu(link).into())
        .and_then(|()| socket.add_ingress(tap_index))
        .and_then(|()| socket.redirect(tap_index, index))
        .map_err(at("set its tap up"))?;
    match socket.add_ingress(index) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            // Of a container that was killed, and whose tap is gone.
            if !socket
                .has_redirect(index)
                .map_err(at("look at its qdisc"))?
            {
                return Err(Error::ForeignQdisc(name(link).to_owned()));
            }
            socket
                .remove_ingress(index)
                .and_then(|()| socket.add_ingress(index))
                .map_err(at("add a qdisc"))?;
        }
        result => result.map_err(at("add a qdisc"))?,
    }
    socket
        .redirect(index, tap_index)
        .map_err(at("redirect what arrives"))?;
    Ok(tap)
}

/// Addresses, routes and neighbours of the namespace.
#[derive(Debug)]
struct Everything {
    addresses: Vec<AddressMessage>,
    routes: Vec<RouteMessage>,
    neighbours: Vec<NeighbourMessage>,
}

impl Everything {
    fn read(socket: &mut Socket) -> Result<Everything, Error> {
        let step = |name| move |error| Error::Step(name, error);
        Ok(Everything {
            addresses: socket.addresses().map_err(step("list addresses"))?,
            routes: socket.routes().map_err(step("list routes"))?,
            neighbours: socket.neighbours().map_err(step("list neighbours"))?,
        })
    }

    fn describe(&self, link: &LinkMessage) -> Joined {
        let index = link.header.index;
        let up = link.header.flags.contains(LinkFlags::Up);
        let addresses = self.addresses.iter().filter(|of| of.header.index == index);
        let neighbours = self
            .neighbours
            .iter()
            .filter(|of| of.header.ifindex == index);
        let mut routes: Vec<Route> = match up {
            true => self
                .routes
                .iter()
                .filter_map(|of| route(of, index))
                .collect(),
            false => Vec::new(),
        };
        // Those that gateways are reached by come first.
        routes.sort_by_key(|route| route.gateway.is_some());
        Joined {
            card: Card {
                slot: 0,
                name: name(link).to_owned(),
                up,
                ipv6: has_ipv6(link),
                addresses: addresses.filter_map(address).collect(),
                routes,
                neighbours: neighbours.filter_map(neighbour).collect(),
            },
            mac: mac(link),
            mtu: mtu(link),
        }
    }
}

/// What somebody gave the link. Not what it made up itself, which the guest's will, too.
fn address(message: &AddressMessage) -> Option<Address> {
    let mut local = None;
    let mut other = None;
    let mut broadcast = None;
    let mut flags = AddressFlags::empty();
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => other = Some(*address),
            AddressAttribute::Broadcast(address) => broadcast = Some(*address),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    let address = local.or(other)?;
    if let IpAddr::V6(address) = address
        && (address.is_unicast_link_local() || !flags.contains(AddressFlags::Permanent))
    {
        return None;
    }
    Some(Address {
        address,
        prefix: message.header.prefix_len,
        peer: other.filter(|other| *other != address),
        broadcast,
        scope: message.header.scope.into(),
    })
}

/// Routes of the main table that somebody made: the kernel's own come with the addresses.
fn route(message: &RouteMessage, link: u32) -> Option<Route> {
    let header = &message.header;
    let made = !matches!(
        header.protocol,
        RouteProtocol::Kernel | RouteProtocol::Ra | RouteProtocol::IcmpRedirect
    );
    let mut route = Route {
        destination: match header.address_family {
            netlink_packet_route::AddressFamily::Inet => IpAddr::from([0; 4]),
            _ => IpAddr::from([0; 16]),
        },
        prefix: header.destination_prefix_length,
        gateway: None,
        source: None,
        metric: 0,
        scope: header.scope.into(),
        on_link: header.flags.contains(RouteFlags::Onlink),
    };
    let mut table = header.table.into();
    let mut interface = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => route.destination = ip(address)?,
            RouteAttribute::Gateway(address) => route.gateway = Some(ip(address)?),
            RouteAttribute::PrefSource(address) => route.source = Some(ip(address)?),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Oif(index) => interface = Some(*index),
            // A gateway of the other family.
            RouteAttribute::Via(_) => return None,
            _ => {}
        }
    }
    let wanted = made
        && header.kind == RouteType::Unicast
        && table == u32::from(RouteHeader::RT_TABLE_MAIN)
        && interface == Some(link);
    wanted.then_some(route)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let mut address = None;
    let mut mac = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(of)) => {
                address = Some((*of).into());
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(of)) => {
                address = Some((*of).into());
            }
            NeighbourAttribute::LinkLayerAddress(of) => mac = of.as_slice().try_into().ok(),
            _ => {}
        }
    }
    Some(Neighbour {
        address: address?,
        mac: mac?,
    })
}

#[cfg(test)]
mod tests;
