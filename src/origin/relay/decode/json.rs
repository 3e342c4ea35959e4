//! Writing JSON for the stream.

/// A JSON object being written.
pub(super) struct Object {
    pub json: Vec<u8>,
    first: bool,
}

impl Object {
    pub fn new() -> Self {
        Self { json: b"{".to_vec(), first: true }
    }

    /// Starts an object at the end of the existing text.
    pub fn behind(mut json: Vec<u8>) -> Self {
        json.push(b'{');
        Self { json, first: true }
    }

    pub fn key(&mut self, name: &str) {
        if !std::mem::take(&mut self.first) {
            self.json.push(b',');
        }
        write_string(&mut self.json, name);
        self.json.push(b':');
    }

    pub fn raw(&mut self, name: &str, json: &str) {
        self.key(name);
        self.json.extend_from_slice(json.as_bytes());
    }

    pub fn text(&mut self, name: &str, value: &str) {
        self.key(name);
        write_string(&mut self.json, value);
    }

    pub fn optional(&mut self, name: &str, value: Option<&str>) {
        match value {
            Some(value) => self.text(name, value),
            None => self.raw(name, "null"),
        }
    }

    pub fn close(mut self) -> String {
        self.json.push(b'}');
        self.into_string()
    }

    pub fn into_string(self) -> String {
        into_string(self.json)
    }
}

fn write_string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    let mut plain = 0;
    for (at, byte) in text.bytes().enumerate() {
        let escape = match byte {
            b'"' => "\\\"",
            b'\\' => "\\\\",
            0..0x20 => "",
            _ => continue,
        };
        out.extend_from_slice(&text.as_bytes()[plain..at]);
        if escape.is_empty() {
            out.extend_from_slice(format!("\\u{byte:04x}").as_bytes());
        } else {
            out.extend_from_slice(escape.as_bytes());
        }
        plain = at + 1;
    }
    out.extend_from_slice(&text.as_bytes()[plain..]);
    out.push(b'"');
}

/// A text as JSON.
pub(super) fn quoted(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len() + 2);
    write_string(&mut out, text);
    into_string(out)
}

fn into_string(json: Vec<u8>) -> String {
    // Only whole strings and JSON were written, so nothing is ever replaced here.
    String::from_utf8(json).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}
