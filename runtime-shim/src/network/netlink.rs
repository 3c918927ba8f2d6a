// SPDX-License-Identifier: Apache-2.0
//! Questions to the kernel about the network namespace of the thread that opens the socket: rtnetlink(7).

use std::io;
use std::os::fd::OwnedFd;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage,
};
use netlink_packet_route::neighbour::NeighbourMessage;
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirrorOption, TcActionOption, TcActionType, TcAttribute,
    TcFilterMatchAllOption, TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption,
};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

/// The kernel fills no more than 32 KiB at once.
const BUFFER: usize = 64 << 10;

/// The filter that redirects. Its number says whose it is: `SBOX`.
const FILTER: TcHandle = TcHandle {
    major: 0x5342,
    minor: 0x4f58,
};
/// Where the filters of an ingress qdisc are, and its own number.
const INGRESS: TcHandle = TcHandle {
    major: 0xffff,
    minor: 0,
};
/// Priority in the upper half, ETH_P_ALL in network order in the lower.
const PRIORITY: u32 = (49152 << 16) | (libc::ETH_P_ALL as u16).to_be() as u32;

#[derive(Debug)]
pub struct Socket {
    socket: OwnedFd,
    sequence: u32,
}

impl Socket {
    pub fn open() -> io::Result<Socket> {
        let (family, flags) = (AddressFamily::NETLINK, SocketFlags::CLOEXEC);
        // Protocol 0 is NETLINK_ROUTE.
        let socket = socket_with(family, SocketType::RAW, flags, None)?;
        Ok(Socket {
            socket,
            sequence: 0,
        })
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        send(&self.socket, &bytes, SendFlags::empty())?;
        Ok(())
    }

    /// Hands on the answers to the last question until they end.
    fn answers(&mut self, mut take: impl FnMut(RouteNetlinkMessage)) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        loop {
            let (length, _) = recv(&self.socket, &mut buffer, RecvFlags::empty())?;
            let mut rest = &buffer[..length];
            while !rest.is_empty() {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(io::Error::other)?;
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Error(error) => {
                        return match error.code {
                            None => Ok(()),
                            Some(_) => Err(error.to_io()),
                        };
                    }
                    NetlinkPayload::InnerMessage(message) => take(message),
                    _ => {}
                }
                // Whole messages, each of them padded.
                let size = (message.header.length as usize).next_multiple_of(4);
                rest = rest.get(size.max(4)..).unwrap_or_default();
            }
        }
    }

    fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.send(message, NLM_F_ACK | flags)?;
        self.answers(drop)
    }

    fn list<T>(
        &mut self,
        question: RouteNetlinkMessage,
        mut take: impl FnMut(RouteNetlinkMessage) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        self.send(question, NLM_F_DUMP)?;
        let mut found = Vec::new();
        self.answers(|message| found.extend(take(message)))?;
        Ok(found)
    }

    pub fn links(&mut self) -> io::Result<Vec<LinkMessage>> {
        let question = RouteNetlinkMessage::GetLink(LinkMessage::default());
        self.list(question, |message| match message {
            RouteNetlinkMessage::NewLink(link) => Some(link),
            _ => None,
        })
    }

    pub fn addresses(&mut self) -> io::Result<Vec<AddressMessage>> {
        let question = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        self.list(question, |message| match message {
            RouteNetlinkMessage::NewAddress(address) => Some(address),
            _ => None,
        })
    }

    pub fn routes(&mut self) -> io::Result<Vec<RouteMessage>> {
        let question = RouteNetlinkMessage::GetRoute(RouteMessage::default());
        self.list(question, |message| match message {
            RouteNetlinkMessage::NewRoute(route) => Some(route),
            _ => None,
        })
    }

    pub fn neighbours(&mut self) -> io::Result<Vec<NeighbourMessage>> {
        let question = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        self.list(question, |message| match message {
            RouteNetlinkMessage::NewNeighbour(neighbour) => Some(neighbour),
            _ => None,
        })
    }

    /// The index of the link of a name.
    pub fn index(&mut self, name: &str) -> io::Result<u32> {
        Ok(rustix::net::netdevice::name_to_index(&self.socket, name)?)
    }

    /// Sets a tap up as a mere wire: it has no address of its own to announce.
    pub fn prepare_tap(&mut self, index: u32, mtu: u32) -> io::Result<()> {
        let silent = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes = vec![
            LinkAttribute::Mtu(mtu),
            LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![silent])]),
        ];
        let with_ipv6 = self.change(RouteNetlinkMessage::NewLink(message.clone()), 0);
        if with_ipv6.is_err() {
            // A host without IPv6 does not know the second one.
            message.attributes.truncate(1);
            self.change(RouteNetlinkMessage::NewLink(message), 0)?;
        }
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.change(RouteNetlinkMessage::NewLink(message), 0)
    }

    fn ingress(index: u32) -> TcMessage {
        // Interface indices are positive.
        let mut message = TcMessage::with_index(index as i32);
        message.header.parent = TcHandle::INGRESS;
        message.header.handle = INGRESS;
        message
            .attributes
            .push(TcAttribute::Kind("ingress".to_owned()));
        message
    }

    /// `tc qdisc add dev … ingress`.
    pub fn add_ingress(&mut self, index: u32) -> io::Result<()> {
        let message = RouteNetlinkMessage::NewQueueDiscipline(Self::ingress(index));
        self.change(message, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// With all its filters.
    pub fn remove_ingress(&mut self, index: u32) -> io::Result<()> {
        self.change(
            RouteNetlinkMessage::DelQueueDiscipline(Self::ingress(index)),
            0,
        )
    }

    /// `tc filter add dev FROM ingress matchall action mirred egress redirect dev TO`.
    pub fn redirect(&mut self, from: u32, to: u32) -> io::Result<()> {
        let mut mirror = TcMirror::default();
        mirror.generic.action = TcActionType::Stolen;
        mirror.eaction = TcMirrorActionType::EgressRedir;
        mirror.ifindex = to;
        let mut action = TcAction::default();
        action.attributes = vec![
            TcActionAttribute::Kind("mirred".to_owned()),
            TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
                mirror,
            ))]),
        ];
        let mut message = TcMessage::with_index(from as i32);
        message.header.parent = INGRESS;
        message.header.handle = FILTER;
        message.header.info = PRIORITY;
        message.attributes = vec![
            TcAttribute::Kind("matchall".to_owned()),
            TcAttribute::Options(vec![TcOption::MatchAll(TcFilterMatchAllOption::Action(
                vec![action],
            ))]),
        ];
        self.change(
            RouteNetlinkMessage::NewTrafficFilter(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }

    /// Whether the ingress qdisc of a link holds a filter of [`Socket::redirect`].
    pub fn has_redirect(&mut self, index: u32) -> io::Result<bool> {
        let mut message = TcMessage::with_index(index as i32);
        message.header.parent = INGRESS;
        let question = RouteNetlinkMessage::GetTrafficFilter(message);
        let filters = self.list(question, |message| match message {
            RouteNetlinkMessage::NewTrafficFilter(filter) => Some(filter.header.handle),
            _ => None,
        })?;
        Ok(filters.contains(&FILTER))
    }
}
