// SPDX-License-Identifier: Apache-2.0
//! A runtime table at the end of containerd's config.toml, between two lines to find it by.

use super::EngineError;

const BEGIN: &str = "# Begin of what `sandbox install --engine containerd` wrote.";
const END: &str = "# End of what `sandbox install --engine containerd` wrote.";

pub fn with(before: Option<&str>, program: &str) -> Result<String, EngineError> {
    let own = before.map(without).transpose()?.unwrap_or_default();
    let mut text = own.clone();
    let version = version(&own);
    let plugin = match (version, own.trim().is_empty()) {
        (Some("2"), _) | (None, true) => "io.containerd.grpc.v1.cri",
        (Some("3"), _) => "io.containerd.cri.v1.runtime",
        (other, _) => return Err(EngineError::Version(other.unwrap_or("1").to_owned())),
    };
    let table = format!("plugins.\"{plugin}\".containerd.runtimes.sandbox");
    if own.contains(&format!("{table}]")) {
        return Err(EngineError::Foreign);
    }
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text.push_str(BEGIN);
    text.push('\n');
    if version.is_none() {
        text.push_str("version = 2\n");
    }
    text.push_str(&format!(
        "[{table}]\n\
         \x20 runtime_type = \"io.containerd.runc.v2\"\n\
         \x20 pod_annotations = [\"io.sandbox.*\"]\n\
         \x20 [{table}.options]\n\
         \x20   BinaryName = \"{program}\"\n"
    ));
    text.push_str(END);
    text.push('\n');
    Ok(text)
}

pub fn without(text: &str) -> Result<String, EngineError> {
    let line = |wanted: &str| {
        let mut start = 0;
        text.split_inclusive('\n').find_map(|line| {
            let at = start;
            start += line.len();
            (line.trim_end() == wanted).then_some((at, start))
        })
    };
    match (line(BEGIN), line(END)) {
        (None, None) => Ok(text.to_owned()),
        (Some((begin, _)), Some((at, end))) if begin < at => {
            Ok(format!("{}{}", &text[..begin], &text[end..]))
        }
        (None, _) => Err(EngineError::Markers(END)),
        (Some(_), _) => Err(EngineError::Markers(BEGIN)),
    }
}

/// The value of `version` before the first table.
fn version(text: &str) -> Option<&str> {
    text.lines()
        .map(str::trim_start)
        .take_while(|line| !line.starts_with('['))
        .find_map(|line| {
            let value = line
                .strip_prefix("version")?
                .trim_start()
                .strip_prefix('=')?;
            Some(value.split('#').next().unwrap_or_default().trim())
        })
}
