// SPDX-License-Identifier: Apache-2.0

use std::net::{Ipv4Addr, Ipv6Addr};

use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::LinkInfo;

use super::*;

fn link(index: u32, name: &str) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.link_layer_type = LinkLayerType::Ether;
    message.header.flags = LinkFlags::Up;
    message.attributes = vec![
        LinkAttribute::IfName(name.into()),
        LinkAttribute::Mtu(9000),
        LinkAttribute::Address(vec![2, 0, 0, 0, 0, 1]),
    ];
    message
}

#[test]
fn links_that_are_for_the_guest() {
    assert!(is_joinable(&link(2, "eth0")));
    assert!(!is_joinable(&link(3, &tap_name(2))), "its own tap");
    let mut lo = link(1, "lo");
    lo.header.link_layer_type = LinkLayerType::Loopback;
    lo.header.flags |= LinkFlags::Loopback;
    assert!(!is_joinable(&lo));
    let mut port = link(4, "veth1");
    port.attributes.push(LinkAttribute::Controller(5));
    assert!(!is_joinable(&port), "a port of a bridge");
    let mut tunnel = link(6, "gretap0");
    let kind = LinkInfo::Kind(InfoKind::GreTap);
    tunnel.attributes.push(LinkAttribute::LinkInfo(vec![kind]));
    assert!(is_joinable(&tunnel), "one that somebody uses");
    tunnel.header.flags = LinkFlags::empty();
    assert!(!is_joinable(&tunnel), "one that the kernel makes");
    assert!(tap_name(u32::MAX).len() <= 16);
}

fn address_of(address: IpAddr, prefix: u8, flags: AddressFlags) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = 2;
    message.header.prefix_len = prefix;
    message.attributes = vec![
        AddressAttribute::Address(address),
        AddressAttribute::Flags(flags),
    ];
    if address.is_ipv4() {
        message.attributes.push(AddressAttribute::Local(address));
    }
    message
}

#[test]
fn addresses_that_somebody_gave() {
    let own = address_of([10, 1, 0, 2].into(), 24, AddressFlags::Permanent);
    let own = address(&own).unwrap();
    assert_eq!((own.address, own.peer), ([10, 1, 0, 2].into(), None));
    let mut peer = address_of([10, 1, 0, 2].into(), 32, AddressFlags::Permanent);
    peer.attributes[0] = AddressAttribute::Address([10, 9, 9, 9].into());
    assert_eq!(address(&peer).unwrap().peer, Some([10, 9, 9, 9].into()));

    let global: Ipv6Addr = "fd01::2".parse().unwrap();
    let given = address_of(global.into(), 64, AddressFlags::Permanent);
    assert_eq!(address(&given).unwrap().address, IpAddr::V6(global));
    let advertised = address_of(global.into(), 64, AddressFlags::empty());
    assert_eq!(address(&advertised), None);
    let local: Ipv6Addr = "fe80::1".parse().unwrap();
    let local = address_of(local.into(), 64, AddressFlags::Permanent);
    assert_eq!(address(&local), None);
}

fn route_by(gateway: Option<Ipv4Addr>, protocol: RouteProtocol) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = protocol;
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![RouteAttribute::Oif(2)];
    match gateway {
        Some(gateway) => {
            let gateway = RouteAddress::Inet(gateway);
            message.attributes.push(RouteAttribute::Gateway(gateway));
        }
        None => {
            message.header.destination_prefix_length = 32;
            let destination = RouteAddress::Inet([10, 1, 0, 1].into());
            message
                .attributes
                .push(RouteAttribute::Destination(destination));
        }
    }
    message
}

#[test]
fn routes_come_in_an_order_that_works() {
    let gateway = Some(Ipv4Addr::new(10, 1, 0, 1));
    let mut elsewhere = route_by(gateway, RouteProtocol::Boot);
    elsewhere.attributes.push(RouteAttribute::Table(100));
    let everything = Everything {
        addresses: Vec::new(),
        routes: vec![
            route_by(gateway, RouteProtocol::Boot),
            route_by(None, RouteProtocol::Kernel),
            route_by(None, RouteProtocol::Static),
            elsewhere,
        ],
        neighbours: Vec::new(),
    };
    let joined = everything.describe(&link(2, "eth0"));
    assert_eq!((joined.mtu, joined.mac), (9000, [2, 0, 0, 0, 0, 1]));
    let gateways: Vec<_> = joined.card.routes.iter().map(|of| of.gateway).collect();
    assert_eq!(gateways, [None, gateway.map(IpAddr::V4)]);
    assert_eq!(joined.card.routes[0].prefix, 32);
    assert!(everything.describe(&link(3, "eth1")).card.routes.is_empty());
    let mut down = link(2, "eth0");
    down.header.flags = LinkFlags::empty();
    let down = everything.describe(&down);
    assert!(!down.card.up && down.card.routes.is_empty());
}
