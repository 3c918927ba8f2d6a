// SPDX-License-Identifier: Apache-2.0
use agent_protocol::{Capabilities, CgroupPlan, Process, WindowSize};
use vmm::StopReason;

use super::*;
use crate::control::Descriptors;

const NOW: fn() -> Instant = Instant::now;

fn process(args: &[&str]) -> Process {
    Process {
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        env: Vec::new(),
        cwd: "/".into(),
        terminal: None,
        uid: 0,
        gid: 0,
        additional_gids: Vec::new(),
        umask: None,
        capabilities: Capabilities::default(),
        rlimits: Vec::new(),
        no_new_privileges: false,
        oom_score_adj: None,
        seccomp: None,
        scheduler: None,
        io_priority: None,
        personality: None,
        affinity_initial: None,
        affinity_final: None,
    }
}

fn guest() -> GuestPlan {
    GuestPlan {
        rootfs: "rootfs".into(),
        rootfs_readonly: false,
        rootfs_propagation: 0,
        namespaces: 0,
        uid_mappings: Vec::new(),
        gid_mappings: Vec::new(),
        time_offsets: Vec::new(),
        hostname: None,
        domainname: None,
        mounts: Vec::new(),
        devices: Vec::new(),
        default_devices: true,
        masked_paths: Vec::new(),
        readonly_paths: Vec::new(),
        sysctls: Vec::new(),
        cgroup: CgroupPlan::default(),
        cards: Vec::new(),
        process: process(&["init"]),
        start_hooks: Vec::new(),
        state: String::new(),
    }
}

fn null() -> OwnedFd {
    std::fs::File::open("/dev/null").unwrap().into()
}

/// A container whose stdout is looked at, booting.
fn booting(start: bool) -> Container {
    let template = Template {
        id: "c".into(),
        guest: guest(),
        start,
        streams: Streams::Separate {
            stdin: None,
            stdout: Some(null()),
            stderr: None,
        },
        deadlines: Deadlines::default(),
    };
    let (container, actions) = Container::new(template, NOW());
    assert_eq!(words(&actions), ["accept 1024"]);
    container
}

/// Up to where nothing is missing but the start.
fn created() -> Container {
    let mut container = booting(false);
    container.from_agent(ready(), NOW());
    container.from_agent(answered(Asked::Prepare, Ok(AgentReply::Done)), NOW());
    let actions = container.from_agent(created_answer(), NOW());
    assert_eq!(words(&actions), ["report Created"]);
    container
}

fn running() -> Container {
    let mut container = created();
    container.request(0, Request::Start { cards: Vec::new() }, Vec::new(), NOW());
    let actions = container.from_agent(done(Asked::Start(Some(0))), NOW());
    assert_eq!(words(&actions), ["0: Done"]);
    container
}

fn ready() -> Incoming<Asked> {
    Incoming::Event(Event::Ready {
        version: VERSION,
        age_ns: 0,
    })
}

fn answered(asked: Asked, result: Result<AgentReply, AgentError>) -> Incoming<Asked> {
    Incoming::Answer { asked, result }
}

fn done(asked: Asked) -> Incoming<Asked> {
    answered(asked, Ok(AgentReply::Done))
}

fn created_answer() -> Incoming<Asked> {
    answered(Asked::Create, Ok(AgentReply::Created { pid: 7 }))
}

fn error(kind: ErrorKind, message: &str) -> AgentError {
    AgentError {
        kind,
        message: message.into(),
    }
}

fn exited(container: &str, process: u32, status: u8) -> Incoming<Asked> {
    Incoming::Event(Event::Exited {
        container: container.into(),
        process,
        status,
    })
}

/// Actions in short.
fn words(actions: &[Action]) -> Vec<String> {
    let word = |action: &Action| match action {
        Action::Ask { request, .. } => match request {
            AgentRequest::Signal {
                process,
                signal,
                all,
                ..
            } => format!("ask Signal {process} {signal} {all}"),
            AgentRequest::Exec { process, .. } => format!("ask Exec {process}"),
            AgentRequest::Resize { process, .. } => format!("ask Resize {process}"),
            request => {
                let text = format!("{request:?}");
                let name = text.split([' ', '{']).next().unwrap_or_default();
                format!("ask {name}")
            }
        },
        Action::Accept { port, .. } => format!("accept {port}"),
        Action::Reset { port } => format!("reset {port}"),
        Action::ResetUnopened { port } => format!("reset unopened {port}"),
        Action::Answer { verb, reply } => match reply {
            Reply::Failed(error) => format!("{verb}: {error}"),
            reply => format!("{verb}: {reply:?}"),
        },
        Action::Hangup { verb } => format!("hang up {verb}"),
        Action::Report(Report::Failed(failure)) => {
            let text = failure.to_string();
            let message = text.split(": the guest's console is empty").next();
            format!("failed: {}", message.unwrap_or_default())
        }
        Action::Report(report) => format!("report {report:?}"),
        Action::Save { .. } => "save".to_owned(),
        Action::Thaw => "thaw".to_owned(),
        Action::Plug { verb, cards } => format!("{verb}: plug {}", cards.len()),
        Action::Exit(status) => format!("exit {status}"),
    };
    actions.iter().map(word).collect()
}

fn exec(container: &mut Container, verb: Verb) -> Vec<String> {
    let stdio = Descriptors::Streams {
        stdin: false,
        stdout: true,
        stderr: false,
    };
    let request = Request::Exec {
        process: Box::new(process(&["nosuch"])),
        stdio,
        ignore_paused: false,
    };
    words(&container.request(verb, request, vec![null()], NOW()))
}

fn signal(container: &mut Container, verb: Verb, signal: i32) -> Vec<String> {
    let request = Request::Signal { signal, all: false };
    words(&container.request(verb, request, Vec::new(), NOW()))
}

#[test]
fn a_life_from_boot_to_exit_status() {
    let mut container = booting(false);
    let actions = container.from_agent(ready(), NOW());
    assert_eq!(
        words(&actions),
        ["report Stage(Create)", "ask Prepare", "ask Create"]
    );
    let actions = container.from_agent(created_answer(), NOW());
    assert_eq!(words(&actions), ["report Created"]);
    let actions = container.request(5, Request::Start { cards: Vec::new() }, Vec::new(), NOW());
    assert_eq!(words(&actions), ["ask Start"]);
    let actions = container.from_agent(done(Asked::Start(Some(5))), NOW());
    assert_eq!(words(&actions), ["5: Done"]);
    let actions = container.from_agent(exited("c", 0, 3), NOW());
    assert_eq!(words(&actions), ["reset unopened 1024", "ask Shutdown"]);
    let actions = container.from_agent(done(Asked::Shutdown), NOW());
    assert_eq!(
        words(&actions),
        [""; 0],
        "the output is not yet with its reader"
    );
    assert_eq!(words(&container.stream_closed(1024, NOW())), ["exit 3"]);
}

#[test]
fn cards_that_come_with_a_start_are_plugged_first() {
    let joined = || {
        let card = Card {
            slot: 0,
            name: "eth0".into(),
            up: true,
            ipv6: true,
            addresses: Vec::new(),
            routes: Vec::new(),
            neighbours: Vec::new(),
        };
        (
            card.clone(),
            Joined {
                card,
                mac: [2; 6],
                mtu: 1500,
            },
        )
    };
    let mut container = created();
    let (card, moved) = joined();
    let request = Request::Start { cards: vec![moved] };
    let actions = container.request(5, request, vec![null()], NOW());
    assert_eq!(words(&actions), ["5: plug 1"]);
    let actions = container.plugged(5, Ok(vec![card]), NOW());
    assert_eq!(words(&actions), ["ask Start"]);

    let mut container = created();
    let (_, moved) = joined();
    let request = Request::Start { cards: vec![moved] };
    container.request(5, request, vec![null()], NOW());
    let actions = container.plugged(5, Err("no slot".into()), NOW());
    assert_eq!(
        words(&actions),
        ["5: unable to start container process: no slot", "exit 1"]
    );
}

#[test]
fn run_starts_what_it_creates() {
    let mut container = booting(true);
    container.from_agent(ready(), NOW());
    let actions = container.from_agent(created_answer(), NOW());
    assert_eq!(
        words(&actions),
        ["report Created", "report Stage(Start)", "ask Start"]
    );
    let actions = container.from_agent(done(Asked::Start(None)), NOW());
    assert_eq!(words(&actions), ["report Started"]);
}

#[test]
fn a_process_that_ends_before_its_start_is_answered_is_not_lost() {
    let mut container = booting(true);
    container.from_agent(ready(), NOW());
    container.from_agent(created_answer(), NOW());
    assert_eq!(
        words(&container.from_agent(exited("c", 0, 0), NOW())),
        ["reset unopened 1024", "ask Shutdown"]
    );
    let actions = container.from_agent(done(Asked::Start(None)), NOW());
    assert_eq!(words(&actions), ["report Started"]);
    container.stream_closed(1024, NOW());
    assert_eq!(
        words(&container.from_agent(done(Asked::Shutdown), NOW())),
        ["exit 0"]
    );
}

#[test]
fn create_fails_in_the_words_of_runc() {
    let mut container = booting(false);
    container.from_agent(ready(), NOW());
    let refused = Err(error(ErrorKind::ExecutableNotFound, "anything"));
    let actions = container.from_agent(answered(Asked::Create, refused), NOW());
    assert_eq!(
        words(&actions),
        [
            "failed: unable to start container process: exec: \"init\": \
             executable file not found in $PATH",
            "exit 1"
        ]
    );
}

#[test]
fn what_goes_wrong_while_booting_names_the_stage() {
    let now = NOW();
    let mut container = booting(false);
    let actions = container.machine_stopped(&StopReason::Reset, now);
    assert_eq!(
        words(&actions),
        ["failed: guest kernel stopped while booting", "exit 1"]
    );

    let mut container = booting(false);
    assert!(container.time(now).is_empty());
    let late = container.deadline(now).unwrap();
    let actions = container.time(late);
    assert_eq!(
        words(&actions),
        ["failed: guest did not come up within 30 s", "exit 1"]
    );

    let mut container = booting(false);
    assert_eq!(words(&container.creator_gone()), ["exit 1"]);

    let mut container = booting(false);
    container.from_agent(ready(), now);
    let actions = container.overdue(Asked::Create, now);
    assert_eq!(
        words(&actions),
        [
            "failed: the agent did not create the container in time",
            "exit 1"
        ]
    );
}

#[test]
fn a_lying_agent_is_not_believed() {
    let wrong_first = [
        exited("c", 0, 1),
        Incoming::Event(Event::Ready {
            version: 99,
            age_ns: 0,
        }),
    ];
    for message in wrong_first {
        let actions = booting(false).from_agent(message, NOW());
        assert_eq!(words(&actions).last().unwrap(), "exit 1");
    }
    let mut container = running();
    for nobody in [exited("other", 0, 1), exited("c", 7, 1)] {
        assert!(container.from_agent(nobody, NOW()).is_empty());
    }
    assert_eq!(words(&container.from_agent(ready(), NOW()))[1], "exit 137");
    // An answer of the wrong kind creates nothing.
    let mut container = booting(false);
    container.from_agent(ready(), NOW());
    let usage = AgentReply::Usage(Box::default());
    let actions = container.from_agent(answered(Asked::Create, Ok(usage)), NOW());
    assert_eq!(words(&actions)[1], "exit 1");
    // The end is told once.
    let mut container = running();
    container.from_agent(exited("c", 0, 3), NOW());
    assert!(container.from_agent(exited("c", 0, 4), NOW()).is_empty());
    container.stream_closed(1024, NOW());
    assert_eq!(
        words(&container.from_agent(done(Asked::Shutdown), NOW())),
        ["exit 3"]
    );
}

#[test]
fn the_states_are_kept() {
    let mut container = created();
    let running = "0: cannot start an already running container";
    container.request(0, Request::Start { cards: Vec::new() }, Vec::new(), NOW());
    assert_eq!(
        words(&container.request(0, Request::Start { cards: Vec::new() }, Vec::new(), NOW())),
        [running]
    );
    container.from_agent(done(Asked::Start(Some(0))), NOW());
    assert_eq!(
        words(&container.request(0, Request::Start { cards: Vec::new() }, Vec::new(), NOW())),
        [running]
    );
    container.from_agent(exited("c", 0, 0), NOW());
    assert_eq!(
        words(&container.request(0, Request::Start { cards: Vec::new() }, Vec::new(), NOW())),
        ["0: cannot start a container that has stopped"]
    );
    assert_eq!(
        exec(&mut container, 1),
        ["1: cannot exec in a stopped container"]
    );
    assert_eq!(
        signal(&mut container, 1, libc::SIGTERM),
        ["1: container not running"]
    );
    let actions = container.request(1, Request::Usage, Vec::new(), NOW());
    assert_eq!(words(&actions), ["1: container not running"]);
}

#[test]
fn before_the_start_a_signal_ends_it_all() {
    assert_eq!(
        signal(&mut created(), 2, libc::SIGTERM),
        ["2: Done", "exit 143"]
    );
    assert_eq!(signal(&mut created(), 2, libc::SIGUSR1), ["2: Done"]);
    let actions = booting(false).signal(libc::SIGINT, NOW());
    assert_eq!(
        words(&actions),
        ["failed: booting the guest: ended by signal 2", "exit 130"]
    );
}

#[test]
fn kill_needs_no_agent() {
    let now = NOW();
    let mut container = running();
    assert_eq!(
        signal(&mut container, 2, libc::SIGKILL),
        ["ask Signal 0 9 false"]
    );
    let actions = container.overdue(Asked::Kill(Some(2)), now);
    assert_eq!(words(&actions), ["2: Done", "exit 137"]);

    // Nor one that answers and does not do it.
    let mut container = running();
    signal(&mut container, 2, libc::SIGKILL);
    let actions = container.from_agent(done(Asked::Kill(Some(2))), now);
    assert_eq!(words(&actions), ["2: Done"]);
    let cut = container.deadline(now).unwrap();
    assert_eq!(
        words(&container.time(cut)),
        ["reset 1024"],
        "its output is given up first"
    );
    let late = container.deadline(cut).unwrap();
    assert_eq!(words(&container.time(late)), ["exit 137"]);
}

#[test]
fn a_stalled_reader_delays_the_exit_until_a_kill() {
    let now = NOW();
    let mut container = running();
    container.from_agent(exited("c", 0, 0), now);
    container.from_agent(done(Asked::Shutdown), now);
    let much_later = now + Duration::from_secs(3600);
    assert!(container.time(much_later).is_empty());
    assert_eq!(container.deadline(much_later), None);
    let request = Request::Signal {
        signal: libc::SIGKILL,
        all: false,
    };
    let actions = container.request(2, request, Vec::new(), now);
    assert_eq!(words(&actions), ["2: container not running"]);
    let late = container.deadline(now).unwrap();
    assert!(late <= now + FLUSH_AFTER_KILL);
    assert_eq!(words(&container.time(late)), ["exit 0"]);
}

#[test]
fn a_guest_that_goes_away_at_the_end_takes_nothing_with_it() {
    let now = NOW();
    let mut container = running();
    container.from_agent(exited("c", 0, 5), now);
    assert!(container.agent_lost("gone".into(), now).is_empty());
    assert!(
        container
            .machine_stopped(&StopReason::Reset, now)
            .is_empty()
    );
    assert_eq!(words(&container.stream_closed(1024, now)), ["exit 5"]);

    let actions = running().agent_lost("the agent closed its connection".into(), now);
    assert_eq!(
        words(&actions),
        ["failed: the agent closed its connection", "exit 137"]
    );
}

#[test]
fn an_exec_is_answered_when_it_runs_and_when_it_has_been_read() {
    let mut container = running();
    assert_eq!(exec(&mut container, 3), ["accept 1025", "ask Exec 1"]);
    let answer = answered(Asked::Exec(1), Ok(AgentReply::Created { pid: 9 }));
    assert_eq!(words(&container.from_agent(answer, NOW())), ["3: Done"]);
    assert_eq!(
        words(&container.from_agent(exited("c", 1, 4), NOW())),
        ["reset unopened 1025"]
    );
    assert_eq!(
        words(&container.stream_closed(1025, NOW())),
        ["3: Exited(4)", "hang up 3"]
    );
    assert!(container.verb_gone(3, NOW()).is_empty());
    assert_eq!(
        exec(&mut container, 4),
        ["accept 1026", "ask Exec 2"],
        "numbers are new"
    );
}

#[test]
fn an_exec_that_cannot_be_started_leaves_no_port() {
    let mut container = running();
    exec(&mut container, 3);
    let refused = Err(error(
        ErrorKind::ExecutableRefused,
        "Permission denied (os error 13)",
    ));
    assert_eq!(
        words(&container.from_agent(answered(Asked::Exec(1), refused), NOW())),
        [
            "reset 1025",
            "3: unable to start container process: exec: \"nosuch\": permission denied",
            "hang up 3"
        ]
    );
    assert!(container.execs.is_empty());
}

#[test]
fn an_exec_dies_with_its_verb() {
    let now = NOW();
    let mut container = running();
    exec(&mut container, 3);
    let running = answered(Asked::Exec(1), Ok(AgentReply::Created { pid: 9 }));
    container.from_agent(running, now);
    assert_eq!(
        words(&container.verb_gone(3, now)),
        ["ask Signal 1 9 false"]
    );
    // Its output has no reader that matters any more.
    let late = container.deadline(now).unwrap();
    assert_eq!(words(&container.time(late)), ["reset 1025"]);
    assert_eq!(container.deadline(late), None);
    assert!(container.from_agent(exited("c", 1, 137), late).is_empty());
    assert!(container.execs.is_empty());
}

#[test]
fn signals_and_sizes_go_to_the_process_of_the_connection() {
    let mut container = running();
    exec(&mut container, 3);
    assert_eq!(
        signal(&mut container, 3, libc::SIGHUP),
        ["ask Signal 1 1 false"]
    );
    assert_eq!(
        signal(&mut container, 4, libc::SIGHUP),
        ["ask Signal 0 1 false"]
    );
    let size = WindowSize {
        rows: 1,
        columns: 2,
    };
    let actions = container.request(3, Request::Resize(size), Vec::new(), NOW());
    assert_eq!(words(&actions), ["ask Resize 1"]);
    container.request(3, Request::StandIn { pid: 77 }, Vec::new(), NOW());
    let actions = container.request(4, Request::Processes, Vec::new(), NOW());
    assert_eq!(words(&actions), ["4: Processes([77])"]);
}

#[test]
fn a_paused_container_takes_no_exec() {
    let mut container = running();
    let actions = container.request(1, Request::Pause, Vec::new(), NOW());
    assert_eq!(words(&actions), ["ask Pause"]);
    container.from_agent(done(Asked::Pause(1)), NOW());
    assert_eq!(
        exec(&mut container, 2),
        ["2: cannot exec in a paused container (use --ignore-paused to override)"]
    );
    container.request(1, Request::Resume, Vec::new(), NOW());
    container.from_agent(done(Asked::Resume(1)), NOW());
    assert_eq!(exec(&mut container, 2).len(), 2);
}

#[test]
fn whoever_listens_hears_of_lack_of_memory() {
    let mut container = running();
    container.request(6, Request::Events, Vec::new(), NOW());
    let event = |id: &str| {
        Incoming::Event(Event::OutOfMemory {
            container: id.into(),
        })
    };
    assert_eq!(
        words(&container.from_agent(event("c"), NOW())),
        ["6: OutOfMemory"]
    );
    assert!(container.from_agent(event("x"), NOW()).is_empty());
    container.verb_gone(6, NOW());
    assert!(container.from_agent(event("c"), NOW()).is_empty());
}

#[test]
fn verbs_that_wait_hear_of_the_end() {
    let mut container = running();
    exec(&mut container, 3);
    assert_eq!(words(&container.farewell()), ["3: Exited(137)"]);
}

#[test]
fn descriptors_have_to_be_as_many_as_announced() {
    let mut container = running();
    let request = Request::Exec {
        process: Box::new(process(&["x"])),
        stdio: Descriptors::Terminal,
        ignore_paused: false,
    };
    let actions = container.request(1, request, Vec::new(), NOW());
    assert_eq!(words(&actions), ["1: exec without its file descriptors"]);
}

fn checkpoint(container: &mut Container, verb: Verb) -> Vec<String> {
    words(&container.request(verb, Request::Checkpoint, vec![null(), null()], NOW()))
}

#[test]
fn a_checkpoint_pauses_saves_and_waits_for_its_verb() {
    let mut container = running();
    assert_eq!(checkpoint(&mut container, 5), ["ask Pause"]);
    assert_eq!(
        checkpoint(&mut container, 6),
        ["6: another checkpoint is being made"]
    );
    assert_eq!(
        exec(&mut container, 7),
        ["7: cannot exec in a container that is being saved"]
    );
    let actions = container.from_agent(done(Asked::Freeze), NOW());
    assert_eq!(words(&actions), ["save"]);
    assert!(container.save().is_some());
    assert_eq!(words(&container.saved(Ok(()), NOW())), ["5: Done"]);
    let actions = container.request(5, Request::Thaw, Vec::new(), NOW());
    assert_eq!(words(&actions), ["thaw", "ask Resume", "5: Done"]);

    // One whose verb ends it.
    checkpoint(&mut container, 8);
    container.from_agent(done(Asked::Freeze), NOW());
    container.saved(Ok(()), NOW());
    let actions = container.request(9, Request::End, Vec::new(), NOW());
    assert_eq!(words(&actions), ["9: no checkpoint has been made"]);
    let actions = container.request(8, Request::End, Vec::new(), NOW());
    assert_eq!(words(&actions), ["exit 137"]);
}

#[test]
fn a_checkpoint_without_its_verb_is_as_if_there_was_none() {
    let mut container = running();
    checkpoint(&mut container, 5);
    assert_eq!(words(&container.verb_gone(5, NOW())), [""; 0]);
    let actions = container.from_agent(done(Asked::Freeze), NOW());
    assert_eq!(words(&actions), ["ask Resume"]);

    checkpoint(&mut container, 6);
    container.from_agent(done(Asked::Freeze), NOW());
    container.saved(Ok(()), NOW());
    let actions = container.verb_gone(6, NOW());
    assert_eq!(words(&actions), ["thaw", "ask Resume"]);

    checkpoint(&mut container, 7);
    container.from_agent(done(Asked::Freeze), NOW());
    let actions = container.saved(Err("disk full".into()), NOW());
    assert_eq!(words(&actions), ["thaw", "ask Resume", "7: disk full"]);
}

#[test]
fn only_a_running_container_without_sessions_is_saved() {
    let mut container = created();
    assert_eq!(checkpoint(&mut container, 5), ["5: container not running"]);
    let mut container = running();
    exec(&mut container, 6);
    assert_eq!(
        checkpoint(&mut container, 7),
        ["7: a container with exec sessions cannot be saved, end them first"]
    );
}

#[test]
fn a_restored_container_goes_on_after_it_got_time_and_entropy() {
    let saved = running().save().unwrap();
    let streams = Streams::Separate {
        stdin: Some(null()),
        stdout: Some(null()),
        stderr: None,
    };
    let restored = Container::restore(saved.clone(), streams, false, Deadlines::default(), NOW());
    let (mut container, actions) = restored.unwrap();
    assert_eq!(
        words(&actions),
        [
            "report Stage(Restore)",
            "accept 1024",
            "ask Prepare",
            "ask Resume"
        ]
    );
    container.from_agent(done(Asked::Prepare), NOW());
    let actions = container.from_agent(done(Asked::Restored), NOW());
    assert_eq!(words(&actions), ["report Created", "report Started"]);
    assert_eq!(exec(&mut container, 3), ["accept 1025", "ask Exec 1"]);
    let actions = container.from_agent(exited("c", 0, 4), NOW());
    assert_eq!(words(&actions), ["reset unopened 1024", "ask Shutdown"]);

    let terminal = Streams::Terminal {
        input: null(),
        output: null(),
    };
    let error = Container::restore(saved, terminal, true, Deadlines::default(), NOW()).unwrap_err();
    assert!(error.to_string().contains("must be false"), "{error}");
}

#[test]
fn a_copy_gets_the_id_of_a_boot_before_it_goes_on() {
    let saved = running().save().unwrap();
    let streams = Streams::Separate {
        stdin: None,
        stdout: Some(null()),
        stderr: Some(null()),
    };
    let restored = Container::restore(saved, streams, true, Deadlines::default(), NOW());
    let (mut container, actions) = restored.unwrap();
    assert_eq!(words(&actions)[2..], ["ask Prepare", "ask Mount"]);
    let actions = container.from_agent(done(Asked::Identified), NOW());
    assert_eq!(words(&actions), ["ask Resume"]);
}
