// SPDX-License-Identifier: Apache-2.0
//! The process that an exec asks for: from a file, or the container's own with what the command line
//! changes about it.

use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities, Process, Spec, User};

use super::Error;
use crate::bundle::load_process;
use crate::cli::Exec;

pub fn oci_process(spec: &Spec, arguments: &Exec) -> Result<(Process, Vec<String>), Error> {
    if let Some(path) = &arguments.process {
        return Ok(load_process(path)?);
    }
    if arguments.command.is_empty() {
        return Err(Error::NoCommand);
    }
    let mut process = spec.process().clone().unwrap_or_default();
    process.set_args(Some(arguments.command.clone()));
    process.set_terminal(Some(arguments.tty));
    process.set_console_size(None);
    if let Some(cwd) = &arguments.cwd {
        process.set_cwd(cwd.into());
    }
    if !arguments.env.is_empty() {
        let mut env = process.env().clone().unwrap_or_default();
        env.extend(arguments.env.iter().cloned());
        process.set_env(Some(env));
    }
    if arguments.no_new_privs {
        process.set_no_new_privileges(Some(true));
    }
    if let Some(label) = &arguments.process_label {
        process.set_selinux_label(Some(label.clone()));
    }
    if let Some(profile) = &arguments.apparmor {
        process.set_apparmor_profile(Some(profile.clone()));
    }
    process.set_user(user(process.user(), arguments)?);
    if !arguments.cap.is_empty() {
        process.set_capabilities(Some(capabilities(&process, &arguments.cap)?));
    }
    Ok((process, Vec::new()))
}

/// Numbers only: names would have to be looked up in files of the container.
fn user(own: &User, arguments: &Exec) -> Result<User, Error> {
    let mut user = own.clone();
    if let Some(text) = &arguments.user {
        // Nothing else, not even a sign, may be taken for a number: it would be some other user.
        let number = |digits: &str| match digits.parse() {
            Ok(number) if digits.bytes().all(|digit| digit.is_ascii_digit()) => Ok(number),
            _ => Err(Error::User(text.clone())),
        };
        let (uid, gid) = match text.split_once(':') {
            Some((uid, gid)) => (number(uid)?, Some(number(gid)?)),
            None => (number(text)?, None),
        };
        user.set_uid(uid);
        if let Some(gid) = gid {
            user.set_gid(gid);
        }
    }
    if !arguments.additional_gids.is_empty() {
        let mut gids = user.additional_gids().clone().unwrap_or_default();
        gids.extend(&arguments.additional_gids);
        user.set_additional_gids(Some(gids));
    }
    Ok(user)
}

/// As in runc: ambient ones only where the container has inheritable ones.
fn capabilities(process: &Process, names: &[String]) -> Result<LinuxCapabilities, Error> {
    let mut sets = process.capabilities().clone().unwrap_or_default();
    let mut added = Capabilities::new();
    for name in names {
        let short = name.to_ascii_uppercase();
        let short = short.strip_prefix("CAP_").unwrap_or(&short);
        let capability: Capability = short.parse().map_err(|_| Error::Capability(name.clone()))?;
        added.insert(capability);
    }
    let with = |set: &Option<Capabilities>| -> Option<Capabilities> {
        Some(
            set.iter()
                .flatten()
                .copied()
                .chain(added.iter().copied())
                .collect(),
        )
    };
    let inheritable = sets
        .inheritable()
        .as_ref()
        .is_some_and(|set| !set.is_empty());
    let (bounding, effective) = (with(sets.bounding()), with(sets.effective()));
    let (permitted, ambient) = (with(sets.permitted()), with(sets.ambient()));
    sets.set_bounding(bounding);
    sets.set_effective(effective);
    sets.set_permitted(permitted);
    if inheritable {
        sets.set_ambient(ambient);
    }
    Ok(sets)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};

    fn exec(arguments: &[&str]) -> Exec {
        let all = ["sandbox", "exec"].iter().chain(arguments);
        match Cli::from_arguments(all.map(Into::into).collect())
            .unwrap()
            .command
        {
            Command::Exec(exec) => exec,
            other => panic!("{}", other.name()),
        }
    }

    fn process(arguments: &[&str]) -> Result<Process, Error> {
        oci_process(&Spec::default(), &exec(arguments)).map(|(process, _)| process)
    }

    #[test]
    fn users_are_numbers() {
        for (text, expected) in [
            ("1", (1, 0)),
            ("1:2", (1, 2)),
            ("4294967295:0", (u32::MAX, 0)),
        ] {
            let process = process(&[&format!("--user={text}"), "c", "id"]).unwrap();
            assert_eq!((process.user().uid(), process.user().gid()), expected);
        }
        for text in ["root", "1:", ":1", "-1", "1:2:3", "+1", "4294967296", ""] {
            let process = process(&[&format!("--user={text}"), "c", "id"]);
            assert!(matches!(process, Err(Error::User(_))), "{text:?}");
        }
    }

    #[test]
    fn the_command_line_changes_the_container_s_process() {
        let process = process(&[
            "-t",
            "--cwd",
            "/x",
            "-e",
            "A=b",
            "--cap",
            "cap_sys_admin",
            "c",
            "ls",
        ]);
        let process = process.unwrap();
        assert_eq!(process.args().as_deref(), Some(&["ls".to_owned()][..]));
        assert_eq!(process.terminal(), Some(true));
        assert!(process.env().as_ref().unwrap().contains(&"A=b".to_owned()));
        let capabilities = process.capabilities().as_ref().unwrap();
        let bounding = capabilities.bounding().as_ref().unwrap();
        assert!(bounding.contains(&Capability::SysAdmin));
    }

    #[test]
    fn nothing_to_run_and_unknown_capabilities_are_errors() {
        assert!(matches!(process(&["c"]), Err(Error::NoCommand)));
        assert!(matches!(
            process(&["--cap", "NOPE", "c", "ls"]),
            Err(Error::Capability(_))
        ));
    }
}
