// SPDX-License-Identifier: Apache-2.0
//! Containers in network namespaces made by hand, as engines make them.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use harness::runtime::finish;
use harness::{Bundle, BundleBuilder, DEADLINE, Outcome, Runtime, wait_until};
use serde_json::json;

/// Runs `ip` or `tc` with the words of `line`, which must succeed.
fn host(line: &str) -> String {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().unwrap());
    command.args(words);
    let outcome = finish(command);
    assert_eq!(outcome.status, 0, "{line}: {outcome:?}");
    outcome.text().to_owned()
}

/// A named network namespace, and links between it and the host. Both go on drop.
struct Namespace {
    name: String,
    links: Vec<String>,
}

/// The ends of a link: addresses 10.N.0.1 and fdNN::1 on the host, 10.N.0.2 and fdNN::2 in the container.
struct Ends {
    host: [IpAddr; 2],
    container: [IpAddr; 2],
}

fn unique() -> u32 {
    static COUNT: AtomicU32 = AtomicU32::new(20);
    COUNT.fetch_add(1, Ordering::Relaxed)
}

impl Namespace {
    fn new() -> Namespace {
        let name = format!("test-{}-{}", std::process::id(), unique());
        host(&format!("ip netns add {name}"));
        Namespace {
            name,
            links: Vec::new(),
        }
    }

    fn path(&self) -> String {
        format!("/var/run/netns/{}", self.name)
    }

    fn inside(&self, line: &str) -> String {
        host(&format!("ip netns exec {} {line}", self.name))
    }

    /// A pair of which one end is in the namespace as `name`, with addresses and up.
    fn link(&mut self, name: &str, mtu: u32) -> Ends {
        let (link, ends) = pair();
        self.links.push(link.clone());
        host(&format!("ip link set {link}-c netns {}", self.name));
        host(&format!("ip link set {link} mtu {mtu}"));
        for line in set_up(&link, name, mtu, &ends) {
            self.inside(&line);
        }
        ends
    }

    /// What a container may have left in it.
    fn inventory(&self) -> String {
        self.inside("ip -o link") + &self.inside("tc qdisc show")
    }
}

/// Makes a link with both ends here. That on the host has its addresses.
fn pair() -> (String, Ends) {
    let number = unique();
    let link = format!("test{number}");
    let ends = Ends {
        host: [
            format!("10.{number}.0.1").parse().unwrap(),
            format!("fd{number}::1").parse().unwrap(),
        ],
        container: [
            format!("10.{number}.0.2").parse().unwrap(),
            format!("fd{number}::2").parse().unwrap(),
        ],
    };
    host(&format!("ip link add {link} type veth peer name {link}-c"));
    host(&format!("ip addr add {}/24 dev {link}", ends.host[0]));
    host(&format!("ip addr add {}/64 dev {link} nodad", ends.host[1]));
    host(&format!("ip link set {link} up"));
    (link, ends)
}

/// What is to be said inside of a namespace.
fn set_up(link: &str, name: &str, mtu: u32, ends: &Ends) -> [String; 4] {
    let [v4, v6] = &ends.container;
    [
        format!("ip link set {link}-c name {name} mtu {mtu}"),
        format!("ip addr add {v4}/24 brd + dev {name}"),
        format!("ip addr add {v6}/64 dev {name} nodad"),
        format!("ip link set {name} up"),
    ]
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
        for link in &self.links {
            // Gone with its other end, unless a test has taken that out.
            let _ = Command::new("ip").args(["link", "del", link]).output();
        }
    }
}

const CAPABILITIES: [&str; 3] = ["CAP_NET_RAW", "CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE"];

fn networked(script: &str, namespace: &Namespace) -> BundleBuilder {
    Bundle::script(script).capabilities(&CAPABILITIES).set(
        "/linux/namespaces/1",
        json!({"type": "network", "path": namespace.path()}),
    )
}

/// One echo request from the host.
fn ping(address: IpAddr, size: u32) -> Outcome {
    let size = size.to_string();
    let mut command = Command::new("/bin/busybox");
    command.args(["ping", "-c", "1", "-W", "20", "-s", &size]);
    finish({
        command.arg(address.to_string());
        command
    })
}

/// Sends `bytes` to an echo server and compares what comes back.
fn echo(address: IpAddr, port: u16, bytes: &[u8]) {
    let address = SocketAddr::new(address, port);
    let mut stream = None;
    wait_until("the server in the container listens", || {
        stream = TcpStream::connect_timeout(&address, Duration::from_secs(10)).ok();
        stream.is_some()
    });
    let mut stream = stream.unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut writer = stream.try_clone().unwrap();
    let sent = bytes.to_vec();
    let writing = std::thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    writing.join().unwrap();
    assert_eq!(received.len(), bytes.len());
    assert!(received == bytes, "the bytes are others");
}

/// Bytes that tell when two pieces are exchanged.
fn pattern(length: usize) -> Vec<u8> {
    (0u32..).flat_map(u32::to_le_bytes).take(length).collect()
}

#[test]
fn both_ways_in_both_families() {
    let runtime = Runtime::new();
    let mut namespace = Namespace::new();
    let ends = namespace.link("eth0", 9000);
    let gateway = ends.host[0];
    namespace.inside(&format!("ip route add default via {gateway}"));
    namespace.inside(&format!("ip route add 192.0.2.0/24 via {gateway} metric 7"));
    namespace.inside("ip neigh add 192.0.2.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent");
    let before = namespace.inventory();
    let serve = "nc -ll -p 7 -e cat & exec nc -ll -p 8 -e cat";
    let container = runtime.create(networked(serve, &namespace).build());
    container.start();

    for (address, port) in ends.container.into_iter().zip([7, 8]) {
        ping(address, 8900).ok();
        echo(address, port, b"short");
        echo(address, port, &pattern(4 << 20));
    }
    for address in ends.host {
        let text = address.to_string();
        let reply = container.exec(&["ping", "-c", "1", "-W", "20", "-s", "8900", &text]);
        reply.ok();
        let listener = TcpListener::bind((address, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let sending = std::thread::spawn(move || {
            let mut received = Vec::new();
            listener
                .accept()
                .unwrap()
                .0
                .read_to_end(&mut received)
                .unwrap();
            received.len()
        });
        let send = format!("head -c 4000000 /dev/zero | nc {text} {port}");
        container.exec(&["sh", "-c", &send]).ok();
        assert_eq!(sending.join().unwrap(), 4_000_000);
    }

    let look = "cat /sys/class/net/eth0/mtu /sys/class/net/eth0/address; ip route; ip neigh; ip addr show dev eth0";
    let outcome = container.exec(&["sh", "-c", look]);
    let seen = outcome.ok();
    let mac = namespace.inside("cat /sys/class/net/eth0/address");
    for expected in [
        "9000\n",
        &mac,
        &format!("default via {gateway}"),
        &format!("192.0.2.0/24 via {gateway} dev eth0  metric 7"),
        "192.0.2.9 dev eth0 lladdr 02:00:00:00:00:09",
        &format!("inet {}/24 brd", ends.container[0]),
        &format!("inet6 {}/64", ends.container[1]),
    ] {
        assert!(seen.contains(expected), "{expected:?} in {seen}");
    }

    if runtime.is_sandbox() {
        // Another source address does not leave.
        let change = "ip link set eth0 down; ip link set eth0 address 02:00:00:00:00:77; ip link set eth0 up";
        container.exec(&["sh", "-c", change]).ok();
        let text = gateway.to_string();
        let lost = container.exec(&["ping", "-c", "2", "-W", "3", &text]);
        assert_eq!(lost.status, 1, "{lost:?}");
        let second = runtime.try_create(networked("true", &namespace).build());
        let message = second.unwrap_err().stderr;
        assert!(
            message.contains("eth0: is joined to another container"),
            "{message}"
        );
        // That did not undo what the first has.
        assert!(
            namespace
                .inside("tc filter show dev eth0 ingress")
                .contains("mirred")
        );
    }
    container.call("delete", &["--force"]).ok();
    assert_eq!(namespace.inventory(), before, "something was left");
}

#[test]
fn four_cards_and_not_five() {
    let runtime = Runtime::new();
    let mut namespace = Namespace::new();
    let names = ["eth1", "net7", "eth0", "wan"];
    let ends: Vec<Ends> = names.map(|name| namespace.link(name, 1500)).into();
    let before = namespace.inventory();
    let addresses: Vec<String> = ends
        .iter()
        .flat_map(|ends| ends.host)
        .map(|end| end.to_string())
        .collect();
    let script = format!(
        "cd /sys/class/net; ls -d eth1 net7 eth0 wan; for address in {}; do ping -q -c 1 -W 20 $address >/tmp/x || cat /tmp/x; done",
        addresses.join(" ")
    );
    // Booted and from a template.
    for templates in ["off", "/tmp/network-templates", "/tmp/network-templates"] {
        let bundle = networked(&script, &namespace).build();
        let mut command = runtime.run_command(&bundle);
        command.env("SANDBOX_TEMPLATES", templates);
        let outcome = finish(command);
        assert_eq!(outcome.ok(), "eth0\neth1\nnet7\nwan", "{templates}");
        assert_eq!(namespace.inventory(), before, "something was left");
    }
    if runtime.is_sandbox() {
        namespace.link("one-more", 1500);
        let outcome = runtime.run(&networked("true", &namespace).build());
        let message = outcome.refusal();
        assert!(message.contains("has 5 links"), "{message}");
    }
}

#[test]
fn a_link_that_is_moved_in_between() {
    let runtime = Runtime::new();
    let (link, ends) = pair();
    let gateway = ends.host[0];
    let script =
        format!("ping -q -c 1 -W 20 {gateway} && ping -q -c 1 -W 20 127.0.0.1 && exec sleep 1000");
    let bundle = Bundle::script(&script).capabilities(&CAPABILITIES).build();
    let container = runtime.create(bundle);
    let pid = container.state()["pid"].to_string();
    host(&format!("ip link set {link}-c netns {pid}"));
    for line in set_up(&link, "eth0", 1400, &ends) {
        host(&format!("nsenter -t {pid} -n {line}"));
    }
    container.start();
    ping(ends.container[0], 56).ok();
    ping(ends.container[1], 1300).ok();
    wait_until("the container has pinged", || {
        container.stdout().matches("1 packets received").count() == 2
    });
    container.call("delete", &["--force"]).ok();
    // Its other end was in a namespace that is gone.
    wait_until("the link goes", || !host("ip -o link").contains(&link));
}

/// As Docker's network plugin does it: while `create` waits for a hook.
#[test]
fn a_link_that_a_hook_moves_in() {
    let runtime = Runtime::new();
    let (link, ends) = pair();
    let lines = set_up(&link, "eth0", 1500, &ends);
    let inside: Vec<String> = lines
        .iter()
        .map(|line| format!("nsenter -t $pid -n {line}"))
        .collect();
    let hook = format!(
        r#"pid=$(sed 's/.*"pid": *\([0-9]*\).*/\1/'); ip link set {link}-c netns $pid; {}"#,
        inside.join("; ")
    );
    let bundle = Bundle::script(&format!("ping -q -c 1 -W 20 {}", ends.host[1]))
        .capabilities(&CAPABILITIES)
        .set(
            "/hooks/createRuntime",
            json!([{"path": "/bin/sh", "args": ["sh", "-c", hook], "env": [format!("PATH={}", std::env::var("PATH").unwrap())]}]),
        )
        .build();
    runtime.run(&bundle).ok();
}

#[test]
fn nothing_is_left_by_a_container_that_is_killed_or_refused() {
    let runtime = Runtime::new();
    if !runtime.is_sandbox() {
        return;
    }
    let mut namespace = Namespace::new();
    let ends = namespace.link("eth0", 1500);
    let before = namespace.inventory();
    let container = runtime.create(networked("exec sleep 1000", &namespace).build());
    container.start();
    let pid = container.state()["pid"].to_string();
    host(&format!("kill -KILL {pid}"));
    container.wait_stopped();
    assert_ne!(
        namespace.inventory(),
        before,
        "the qdisc has a mark to be found by"
    );
    // Without a delete: the next one takes over.
    let script = format!("ping -q -c 1 -W 20 {}", ends.host[0]);
    let bundle = networked(&script, &namespace).build();
    runtime.run(&bundle).ok();
    assert_eq!(namespace.inventory(), before);
    container.call("delete", &[]).ok();

    let refused = runtime.run(
        &Bundle::busybox(&["/no/such/program"])
            .set(
                "/linux/namespaces/1",
                json!({"type": "network", "path": namespace.path()}),
            )
            .build(),
    );
    assert_ne!(refused.status, 0);
    assert_eq!(namespace.inventory(), before);

    namespace.inside("tc qdisc add dev eth0 ingress");
    let refused = runtime.run(&networked("true", &namespace).build());
    let message = refused.refusal();
    assert!(
        message.contains("eth0: has an ingress qdisc of its own"),
        "{message}"
    );
    assert!(!namespace.inside("ip -o link").contains("sandbox-"));

    let missing = Bundle::script("true")
        .set(
            "/linux/namespaces/1",
            json!({"type": "network", "path": "/var/run/netns/missing"}),
        )
        .build();
    let refused = runtime.run(&missing);
    assert!(
        refused.refusal().contains("/var/run/netns/missing"),
        "{refused:?}"
    );
}

/// A user namespace in the guest has to own the network namespace that the cards are in.
#[test]
fn root_of_a_user_namespace_owns_its_network() {
    let runtime = Runtime::new();
    if !runtime.is_sandbox() {
        return;
    }
    let mut namespace = Namespace::new();
    let ends = namespace.link("eth0", 1500);
    let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    let script = format!(
        "ip addr add 192.0.2.7/32 dev eth0 && ping -q -c 1 -W 20 {}",
        ends.host[0]
    );
    let bundle = networked(&script, &namespace)
        .set("/linux/namespaces/-", json!({"type": "user"}))
        .set("/linux/uidMappings", mapping.clone())
        .set("/linux/gidMappings", mapping)
        .build();
    runtime.run(&bundle).ok();
}
