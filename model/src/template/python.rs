//! What chat templates expect of Python beyond Jinja itself.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

/// The methods of Python's strings and dicts that chat templates call.
pub(super) fn method(_: &State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let unknown = || Error::new(ErrorKind::UnknownMethod, format!("method {method} is not supported"));
    if value.kind() == ValueKind::Map {
        return dict_method(value, method, args)?.ok_or_else(unknown);
    }
    let text = value.as_str().ok_or_else(unknown)?;
    string_method(text, method, args).ok_or_else(unknown)
}

fn dict_method(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let keys = || value.try_iter();
    Ok(match (method, args) {
        ("get", [key, default @ ..]) => {
            let found = Some(value.get_item(key)?).filter(|v| !v.is_undefined());
            Some(found.or_else(|| default.first().cloned()).unwrap_or(Value::from(())))
        }
        ("keys", []) => Some(keys()?.collect()),
        ("values", []) => Some(Value::from(
            keys()?.map(|k| value.get_item(&k)).collect::<Result<Vec<_>, _>>()?,
        )),
        ("items", []) => {
            let pair = |key: Value| Ok(Value::from(vec![key.clone(), value.get_item(&key)?]));
            Some(Value::from(keys()?.map(pair).collect::<Result<Vec<_>, Error>>()?))
        }
        _ => None,
    })
}

fn string_method(text: &str, method: &str, args: &[Value]) -> Option<Value> {
    let first = args.first().and_then(Value::as_str);
    let chars = |c: char| first.map_or(c.is_whitespace(), |set| set.contains(c));
    Some(match (method, first) {
        ("strip", _) => text.trim_matches(chars).into(),
        ("lstrip", _) => text.trim_start_matches(chars).into(),
        ("rstrip", _) => text.trim_end_matches(chars).into(),
        ("upper", _) => text.to_uppercase().into(),
        ("lower", _) => text.to_lowercase().into(),
        ("title", _) => title(text).into(),
        ("capitalize", _) => capitalize(text).into(),
        ("startswith", Some(prefix)) => text.starts_with(prefix).into(),
        ("endswith", Some(suffix)) => text.ends_with(suffix).into(),
        ("count", Some(part)) if !part.is_empty() => text.matches(part).count().into(),
        ("find", Some(part)) => match text.find(part) {
            // In characters, as Python counts.
            Some(at) => (text[..at].chars().count() as i64).into(),
            None => (-1i64).into(),
        },
        ("split", Some(by)) if !by.is_empty() => match args.get(1).and_then(Value::as_usize) {
            Some(most) => Value::from_iter(text.splitn(most + 1, by)),
            None => Value::from_iter(text.split(by)),
        },
        ("split", None) if args.is_empty() => Value::from_iter(text.split_whitespace()),
        ("splitlines", _) => Value::from_iter(text.lines()),
        ("replace", Some(from)) => text.replace(from, args.get(1)?.as_str()?).into(),
        ("join", _) => {
            let parts: Vec<String> = args.first()?.try_iter().ok()?.map(|part| part.to_string()).collect();
            parts.join(text).into()
        }
        _ => return None,
    })
}

fn capitalize(text: &str) -> String {
    let mut chars = text.chars();
    let first: String = chars.next().into_iter().flat_map(char::to_uppercase).collect();
    first + &chars.as_str().to_lowercase()
}

fn title(text: &str) -> String {
    let is_letter = |c: char| c.is_alphabetic();
    let mut words = String::with_capacity(text.len());
    for part in text.split_inclusive(|c| !is_letter(c)) {
        words += &capitalize(part);
    }
    words
}

/// `tojson` as transformers defines it: `json.dumps` without escapes of what is not ASCII, where minijinja's own
/// filter escapes for HTML.
pub(super) fn to_json(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let failed = |err: serde_json::Error| Error::new(ErrorKind::BadSerialization, err.to_string());
    let value = serde_json::to_value(value).map_err(failed)?;
    let mut text = String::new();
    write_json(&value, indent, 0, &mut text);
    Ok(text)
}

fn write_json(value: &serde_json::Value, indent: Option<usize>, depth: usize, out: &mut String) {
    let line = |out: &mut String, depth: usize| {
        if let Some(indent) = indent {
            out.push('\n');
            out.push_str(&" ".repeat(indent * depth));
        }
    };
    let (open, close, items): (char, char, Vec<(Option<&String>, &serde_json::Value)>) = match value {
        serde_json::Value::Array(items) if !items.is_empty() => ('[', ']', items.iter().map(|v| (None, v)).collect()),
        serde_json::Value::Object(map) if !map.is_empty() => {
            ('{', '}', map.iter().map(|(k, v)| (Some(k), v)).collect())
        }
        other => return out.push_str(&other.to_string()),
    };
    out.push(open);
    for (i, (key, item)) in items.into_iter().enumerate() {
        if i > 0 {
            out.push_str(if indent.is_some() { "," } else { ", " });
        }
        line(out, depth + 1);
        if let Some(key) = key {
            out.push_str(&serde_json::Value::from(key.as_str()).to_string());
            out.push_str(": ");
        }
        write_json(item, indent, depth + 1, out);
    }
    line(out, depth);
    out.push(close);
}

/// The source without `{% generation %}` and its end: marks for training in transformers, unknown to Jinja.
pub(super) fn without_generation_marks(source: &str) -> String {
    let mut kept = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((start, end)) = next_tag(rest) {
        kept.push_str(&rest[..start]);
        let tag = &rest[start..end];
        let name = tag[2..tag.len() - 2].trim_matches(['-', '+', ' ', '\n', '\t', '\r']);
        match name {
            // A block that does nothing keeps the tag's own control of white space.
            "generation" => kept.push_str(&tag.replacen(name, "if true", 1)),
            "endgeneration" => kept.push_str(&tag.replacen(name, "endif", 1)),
            _ => kept.push_str(tag),
        }
        rest = &rest[end..];
    }
    kept + rest
}

/// Where the next `{% … %}` begins and ends.
fn next_tag(text: &str) -> Option<(usize, usize)> {
    let start = text.find("{%")?;
    let end = start + 2 + text[start + 2..].find("%}")? + 2;
    Some((start, end))
}
