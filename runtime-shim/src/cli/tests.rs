// SPDX-License-Identifier: Apache-2.0
use super::*;

fn parse(line: &str) -> Result<Cli, CliError> {
    let arguments = std::iter::once("sandbox")
        .chain(line.split_whitespace())
        .map(OsString::from)
        .collect();
    Cli::from_arguments(arguments)
}

fn error(line: &str) -> String {
    match parse(line) {
        Ok(cli) => panic!("{line}: parsed as {cli:?}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn the_definition_is_consistent() {
    command().debug_assert();
}

/// Word for word what engines send.
#[test]
fn lines_of_engines() {
    let go_runc = "--root /run/containerd/runc/k8s.io --log /b/log.json --log-format json";
    for line in [
        format!("{go_runc} create --bundle /b --pid-file /b/init.pid id"),
        format!(
            "{go_runc} --systemd-cgroup create --bundle /b --pid-file /b/init.pid \
             --console-socket /tmp/pty.sock --no-pivot --no-new-keyring id"
        ),
        format!("{go_runc} start id"),
        format!(
            "{go_runc} exec --process /tmp/p --console-socket /s --detach --pid-file /b/e.pid id"
        ),
        format!("{go_runc} kill --all id 9"),
        format!("{go_runc} delete --force id"),
        format!("{go_runc} ps --format json id"),
        format!("{go_runc} update --resources=- id"),
        format!("{go_runc} events --interval=5s id"),
        format!("{go_runc} restore --image-path /i --detach --bundle /b -no-subreaper id"),
        "features".to_owned(),
        "create --bundle /b --pid-file /p id".to_owned(),
        "--cgroup-manager disabled create -f /c/config.json -b /b id".to_owned(),
        "exec --pid-file /p --process /f --detach --console-socket /s id".to_owned(),
        "--root=/r --rootless=auto --criu /usr/sbin/criu list -q".to_owned(),
        "kill id TERM".to_owned(),
        "checkpoint --image-path I --work-path W --leave-running --tcp-established --file-locks \
         --pre-dump --parent-path ../p id"
            .to_owned(),
        "update --memory -1 --memory-swap=-1 --cpu-quota -1 --pids-limit -1 id".to_owned(),
    ] {
        if let Err(error) = parse(&line) {
            panic!("{line}: {error}");
        }
    }
}

#[test]
fn go_style_long_options() {
    let cli = parse("-root /r -log-format=json run -no-pivot -bundle /b id").unwrap();
    assert_eq!(cli.global.root, Some("/r".into()));
    assert_eq!(cli.global.log_format, LogFormat::Json);
    let Command::Run(run) = cli.command else {
        panic!("not run")
    };
    assert!(run.options.no_pivot);
    assert_eq!(run.bundle, Some("/b".into()));
    assert_eq!(run.target, ["id"]);
}

#[test]
fn options_of_exec_end_at_the_container() {
    for (line, tty, command) in [
        ("exec -t id sh -c ls", true, vec!["sh", "-c", "ls"]),
        (
            "exec id ls -t --help -root",
            false,
            vec!["ls", "-t", "--help", "-root"],
        ),
        ("exec -e A=B -u 1:2 id -t", false, vec!["-t"]),
        ("exec --env A=B id -- ls", false, vec!["ls"]),
        ("exec -- id ls -l", false, vec!["ls", "-l"]),
        ("exec -td id true -- x", true, vec!["true", "--", "x"]),
        ("exec -p /f id", false, vec![]),
    ] {
        let cli = parse(line).unwrap();
        let Command::Exec(exec) = cli.command else {
            panic!("not exec")
        };
        assert_eq!(exec.id, "id", "{line}");
        assert_eq!(exec.command, command, "{line}");
        assert_eq!(exec.tty, tty, "{line}");
    }
    let Command::Ps(ps) = parse("ps -f table id -ef --forest").unwrap().command else {
        panic!("not ps")
    };
    assert_eq!(ps.options, ["-ef", "--forest"]);
}

#[test]
fn bundle_and_id_of_run() {
    let is_bundle = |path: &Path| path == Path::new("dir");
    for (line, bundle, id) in [
        ("run", ".", None),
        ("run id", ".", Some("id")),
        ("run dir", "dir", None),
        ("run dir/", "dir/", None),
        ("run ./id", "./id", None),
        ("run /abs/dir", "/abs/dir", None),
        ("run dir id", "dir", Some("id")),
        ("run other id", "other", Some("id")),
        ("run -b dir", "dir", None),
        ("run -b other id", "other", Some("id")),
        ("run -b other dir", "other", Some("dir")),
        ("run id -d --keep", ".", Some("id")),
    ] {
        let Command::Run(run) = parse(line).unwrap().command else {
            panic!("not run")
        };
        let target = run.target(is_bundle).unwrap();
        assert_eq!(target.bundle, Path::new(bundle), "{line}");
        assert_eq!(target.id.as_deref(), id, "{line}");
    }
    let Command::Run(run) = parse("run -b a b c").unwrap().command else {
        panic!("not run")
    };
    assert!(matches!(run.target(is_bundle), Err(CliError::TwoBundles)));
}

#[test]
fn errors_are_one_line_with_a_hint() {
    for (line, expected) in [
        ("", "no command given (see 'sandbox --help')"),
        ("frob", "unknown command \"frob\" (see 'sandbox --help')"),
        ("start", "start: ID is missing (see 'sandbox start --help')"),
        (
            "create --nope id",
            "create: unknown option --nope (see 'sandbox create --help')",
        ),
        (
            "restore --lsm-mount-context",
            "restore: option --lsm-mount-context requires an argument (see 'sandbox restore --help')",
        ),
        (
            "--log-format xml list",
            "list: option --log-format: \"xml\" is not one of text, json (see 'sandbox list --help')",
        ),
        (
            "start a b",
            "start: unexpected argument \"b\" (see 'sandbox start --help')",
        ),
        (
            "kill id NOPE",
            "kill: SIGNAL: \"NOPE\": unknown signal \"NOPE\" (see 'sandbox kill --help')",
        ),
    ] {
        assert_eq!(error(line), expected, "{line}");
    }
}

#[test]
fn help_and_version_are_for_stdout() {
    for line in [
        "--help",
        "-h",
        "run --help",
        "checkpoint --help",
        "exec -h",
        "monitor --help",
    ] {
        assert!(matches!(parse(line), Err(CliError::Print(_))), "{line}");
    }
    for line in ["--version", "-v", "-V"] {
        let text = error(line);
        let mut lines = text.lines();
        assert!(
            lines.next().unwrap().starts_with("sandbox version "),
            "{text}"
        );
        assert_eq!(lines.last(), Some("spec: 1.3.0"));
    }
}

#[test]
fn help_names_every_verb_and_hides_the_internal_ones() {
    let help = error("--help");
    for subcommand in command().get_subcommands() {
        let listed = help.lines().any(|line| {
            line.trim_start()
                .starts_with(&format!("{} ", subcommand.get_name()))
        });
        assert_eq!(
            listed,
            !subcommand.is_hide_set(),
            "{}",
            subcommand.get_name()
        );
    }
}

#[test]
fn sizes() {
    for (text, bytes) in [
        ("0", 0),
        ("-1", -1),
        ("512m", 512 << 20),
        ("2GiB", 2 << 30),
        ("10 k", 10 << 10),
        ("7b", 7),
    ] {
        assert_eq!(parse_size(text), Ok(bytes), "{text}");
    }
    for text in ["", "m", "1x", "1.5g", "9999999999g", "--1", "1-"] {
        assert!(parse_size(text).is_err(), "{text}");
    }
}

#[test]
fn durations() {
    for (text, milliseconds) in [
        ("5s", 5000),
        ("5", 5000),
        ("1m30s", 90_000),
        ("1.5s", 1500),
        ("20ms", 20),
    ] {
        let expected = std::time::Duration::from_millis(milliseconds);
        assert_eq!(parse_duration(text), Ok(expected), "{text}");
    }
    for text in [
        "",
        "s",
        "5x",
        "5s3",
        "1e9h",
        "-5s",
        "0s",
        "99999999999999999999h",
    ] {
        assert!(parse_duration(text).is_err(), "{text}");
    }
}

#[test]
fn cgroup_managers() {
    for (line, manager) in [
        ("list", CgroupManager::Cgroupfs),
        ("--systemd-cgroup list", CgroupManager::Systemd),
        ("-s list", CgroupManager::Systemd),
        ("--cgroup-manager systemd list", CgroupManager::Systemd),
        ("--cgroup-manager=disabled list", CgroupManager::Disabled),
    ] {
        assert_eq!(
            parse(line).unwrap().global.cgroup_manager(),
            manager,
            "{line}"
        );
    }
}
