// SPDX-License-Identifier: Apache-2.0
//! A member of `runtimes` in daemon.json. The rest of the file stays as its author wrote it, so the
//! change is made in the text.

use std::ops::Range;

use serde_json::Value;

use super::{EngineError, RUNTIME};

pub fn with(before: Option<&str>, program: &str) -> Result<String, EngineError> {
    let Some(text) = before else {
        return Ok(format!(
            "{{\n  \"runtimes\": {{\n    \"{RUNTIME}\": {{\n      \"path\": \"{program}\"\n    }}\n  }}\n}}\n"
        ));
    };
    let document = parse(text)?;
    let entry = format!("\"{RUNTIME}\": {{ \"path\": \"{program}\" }}");
    let top = Object::at(text, open(text));
    let Some(runtimes) = top.member(text, "runtimes") else {
        let entry = format!("\"runtimes\": {{ {entry} }}");
        return Ok(top.inserted(text, &entry));
    };
    let runtimes = Object::at(text, runtimes.value.start);
    match runtimes.member(text, RUNTIME) {
        None => Ok(runtimes.inserted(text, &entry)),
        Some(_) if !is_ours(&document) => Err(EngineError::Foreign),
        Some(_) if document["runtimes"][RUNTIME]["path"] == program => Ok(text.to_owned()),
        Some(member) => {
            let value = &member.value;
            let new = format!("{{ \"path\": \"{program}\" }}");
            Ok(format!(
                "{}{new}{}",
                &text[..value.start],
                &text[value.end..]
            ))
        }
    }
}

/// An empty text where nothing else was in the file.
pub fn without(text: &str) -> Result<String, EngineError> {
    if text.trim().is_empty() || !is_ours(&parse(text)?) {
        return Ok(text.to_owned());
    }
    let top = Object::at(text, open(text));
    let index = top.index(text, "runtimes");
    let Some(member) = index.map(|index| &top.members[index]) else {
        return Ok(text.to_owned());
    };
    let runtimes = Object::at(text, member.value.start);
    match (runtimes.members.len(), top.members.len(), index) {
        (1, 1, _) => Ok(String::new()),
        (1, _, Some(index)) => Ok(top.removed(text, index)),
        _ => match runtimes.index(text, RUNTIME) {
            Some(index) => Ok(runtimes.removed(text, index)),
            None => Ok(text.to_owned()),
        },
    }
}

fn parse(text: &str) -> Result<Value, EngineError> {
    let document: Value =
        serde_json::from_str(text).map_err(|error| EngineError::Json(error.to_string()))?;
    if !document.is_object() {
        return Err(EngineError::Json("it is not an object".to_owned()));
    }
    match document.get("runtimes") {
        None | Some(Value::Object(_)) => Ok(document),
        Some(_) => Err(EngineError::Runtimes),
    }
}

/// Whether the runtime of our name is this program, wherever it is installed.
fn is_ours(document: &Value) -> bool {
    let entry = &document["runtimes"][RUNTIME];
    let path = entry["path"].as_str().unwrap_or_default();
    path.rsplit('/').next() == Some("sandbox")
        && entry.as_object().is_some_and(|fields| fields.len() == 1)
}

fn open(text: &str) -> usize {
    text.find('{').unwrap_or_default()
}

/// An object in the text of a well-formed JSON document.
struct Object {
    /// Of its first byte after the brace, and of the closing brace.
    inside: Range<usize>,
    members: Vec<Member>,
}

struct Member {
    name: Range<usize>,
    value: Range<usize>,
}

impl Object {
    /// `brace`: where it opens.
    fn at(text: &str, brace: usize) -> Object {
        let bytes = text.as_bytes();
        let mut members = Vec::new();
        let mut at = skip_space(bytes, brace + 1);
        while bytes.get(at).is_some_and(|byte| *byte == b'"') {
            let name = at..skip_value(bytes, at);
            let colon = skip_space(bytes, name.end);
            let start = skip_space(bytes, colon + 1);
            let value = start..skip_value(bytes, start);
            at = skip_space(bytes, value.end);
            members.push(Member { name, value });
            if bytes.get(at) == Some(&b',') {
                at = skip_space(bytes, at + 1);
            }
        }
        Object {
            inside: brace + 1..at,
            members,
        }
    }

    fn index(&self, text: &str, name: &str) -> Option<usize> {
        let is = |member: &Member| {
            serde_json::from_str::<String>(&text[member.name.clone()]).is_ok_and(|own| own == name)
        };
        self.members.iter().position(is)
    }

    fn member(&self, text: &str, name: &str) -> Option<&Member> {
        self.index(text, name).map(|index| &self.members[index])
    }

    /// The text with one more member, before the others.
    fn inserted(&self, text: &str, entry: &str) -> String {
        let (before, after) = text.split_at(self.inside.start);
        match self.members.first() {
            Some(first) => {
                let space = &text[self.inside.start..first.name.start];
                format!("{before}{space}{entry},{after}")
            }
            None => format!("{before} {entry} {}", &text[self.inside.end..]),
        }
    }

    /// The text without a member, which is not the only one.
    fn removed(&self, text: &str, index: usize) -> String {
        let end = |index: usize| self.members[index].value.end;
        let after_comma = |from: usize| from + text[from..].find(',').map_or(0, |comma| comma + 1);
        let range = match index {
            0 => self.inside.start..after_comma(end(0)),
            index => end(index - 1)..end(index),
        };
        format!("{}{}", &text[..range.start], &text[range.end..])
    }
}

fn skip_space(bytes: &[u8], from: usize) -> usize {
    let rest = bytes.get(from..).unwrap_or_default();
    let spaces = rest.iter().take_while(|byte| byte.is_ascii_whitespace());
    from + spaces.count()
}

/// Past a string, a number, a word, an object or an array.
fn skip_value(bytes: &[u8], from: usize) -> usize {
    let (mut depth, mut string, mut escaped) = (0u32, false, false);
    for (index, byte) in bytes.iter().enumerate().skip(from) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if string => escaped = true,
            b'"' => string = !string,
            _ if string => continue,
            b'{' | b'[' => depth += 1,
            b',' | b'}' | b']' if depth == 0 => return index,
            b'}' | b']' => depth -= 1,
            byte if depth == 0 && byte.is_ascii_whitespace() => return index,
            _ => continue,
        }
        if depth == 0 && !string && matches!(byte, b'"' | b'}' | b']') {
            return index + 1;
        }
    }
    bytes.len()
}
