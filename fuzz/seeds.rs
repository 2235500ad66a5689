//! Writes the golden vectors of fixtures/wire as fuzzing seeds: `seeds FIXTURES CORPUS`.

use serde_json::Value;
use std::path::Path;

fn main() -> std::io::Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, fixtures, corpus] = &arguments[..] else {
        panic!("usage: seeds FIXTURES CORPUS")
    };
    for (target, file) in [("ipc", "ipc.json"), ("realtime", "realtime.json"), ("app", "app.json"), ("websocket", "")] {
        let folder = Path::new(corpus).join(target);
        std::fs::create_dir_all(&folder)?;
        let text = if file.is_empty() {
            "[]".into()
        } else {
            std::fs::read_to_string(Path::new(fixtures).join(file))?
        };
        let golden: Value = serde_json::from_str(&text)?;

        let mut inputs = Vec::new();
        collect(&golden, &mut inputs);
        if target == "websocket" {
            inputs = frames();
        }

        for (number, mut input) in inputs.into_iter().enumerate() {
            // These two targets read one more byte, the length of the pieces to split the others into.
            if matches!(target, "ipc" | "websocket") {
                input.push(7);
            }
            std::fs::write(folder.join(format!("golden-{number}")), input)?;
        }
    }
    Ok(())
}

/// Collects the inputs in `value`: `json` and `payload` fields are text, other strings of hex digits are binary.
fn collect(value: &Value, inputs: &mut Vec<Vec<u8>>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| collect(item, inputs)),
        Value::Object(fields) => {
            for (name, value) in fields {
                match value.as_str() {
                    Some(text) if matches!(&**name, "json" | "payload") => inputs.push(text.into()),
                    Some(text) => inputs.extend(hex(text)),
                    None => collect(value, inputs),
                }
            }
        }
        _ => {}
    }
}

fn hex(text: &str) -> Option<Vec<u8>> {
    if text.len() < 4 || text.len() % 2 != 0 || !text.is_ascii() {
        return None;
    }
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok())
        .collect()
}

/// One frame of each kind and a fragmented message, masked with zeros.
fn frames() -> Vec<Vec<u8>> {
    let frame = |first: u8, payload: &[u8]| {
        let mut bytes = vec![first];
        match payload.len() {
            short @ 0..=125 => bytes.push(0x80 | short as u8),
            long => {
                bytes.push(0xFE);
                bytes.extend((long as u16).to_be_bytes());
            }
        }

        bytes.extend([0; 4]);
        bytes.extend(payload);
        bytes
    };
    vec![
        frame(0x81, b"{\"id\":1,\"connect\":{}}"),
        frame(0x82, &[0; 300]),
        [frame(0x01, b"Hel"), frame(0x89, b"?"), frame(0x80, b"lo")].concat(),
        frame(0x88, &[0x03, 0xE8, b'b', b'y', b'e']),
        frame(0x8A, b""),
    ]
}
