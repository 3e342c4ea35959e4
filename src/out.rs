//! Output of the commands. Text from a relay, a database or a person is escaped first, and a closed pipe
//! (`standpipe dead-letters list | head -1`) ends the command quietly.

use std::fmt::{self, Write as _};
use std::io::Write as _;

/// Maximum characters in one cell of a table or one part of a line.
pub const CELL: usize = 120;
/// Maximum characters of a message or a reason on one line.
pub const LINE: usize = 300;

/// Standard output is closed: the command has nothing left to do, and has not failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("standard output is closed")
    }
}

impl std::error::Error for Closed {}

/// Prints a line. Terminal control characters are escaped; line breaks and tabs are kept.
///
/// # Errors
///
/// [`Closed`], or the output cannot be written for another reason, such as a full disk.
pub fn line(text: impl fmt::Display) -> anyhow::Result<()> {
    raw(&(lines(&text.to_string()) + "\n"))
}

/// Prints a text as it is, escape sequences included.
///
/// # Errors
///
/// As for [`line`].
pub fn raw(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Err(Closed.into()),
        Err(error) => Err(anyhow::Error::new(error).context("standard output cannot be written")),
    }
}

/// Ignores [`Closed`], for commands whose exit code is the answer.
///
/// # Errors
///
/// Those of [`line`] but [`Closed`].
pub fn unless_closed(printed: anyhow::Result<()>) -> anyhow::Result<()> {
    printed.or_else(|error| if error.is::<Closed>() { Ok(()) } else { Err(error) })
}

/// Prints a line to standard error, escaped like [`line`]. Ignores errors.
pub fn note(text: impl fmt::Display) {
    let _ = writeln!(std::io::stderr(), "{}", lines(&text.to_string()));
}

/// A text on one line, safe to print on a terminal, and no longer than `most` characters.
///
/// An escaped character, such as `\u{1b}`, counts as one.
#[must_use]
pub fn safe(text: &str, most: usize) -> String {
    let mut short = String::with_capacity(text.len().min(most.saturating_mul(4)));
    let mut rest = text.chars();
    for character in rest.by_ref().take(most) {
        escape(character, &mut short);
    }
    if rest.next().is_some() {
        short.push_str("...");
    }
    short
}

/// Equivalent JSON that is safe to print on a terminal. The serialiser already escapes the first 32 characters; the
/// others can occur only in strings, where JSON escapes apply.
#[must_use]
pub fn safe_json(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for character in json.chars() {
        if character > '\u{1f}' && is_harmful(character) {
            let mut units = [0; 2];
            for unit in character.encode_utf16(&mut units) {
                let _ = write!(text, "\\u{unit:04x}");
            }
        } else {
            text.push(character);
        }
    }
    text
}

/// A whole text, with its line breaks and tabs.
fn lines(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        if matches!(character, '\n' | '\t') {
            safe.push(character);
        } else {
            escape(character, &mut safe);
        }
    }
    safe
}

fn escape(character: char, into: &mut String) {
    if is_harmful(character) {
        let _ = write!(into, "{}", character.escape_unicode());
    } else {
        into.push(character);
    }
}

/// Whether a character controls the terminal or changes the order of other characters.
fn is_harmful(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            // marks, embeddings, overrides and isolates of the writing direction
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
            // separators of lines and paragraphs, and a byte order mark
            | '\u{2028}' | '\u{2029}' | '\u{feff}'
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminal_control_characters_are_escaped() {
        let text = "a\u{1b}[2Jb\0c\u{7}d\ne\u{9b}1mf\u{202e}g\u{2069}h";
        let shown = "a\\u{1b}[2Jb\\u{0}c\\u{7}d\\u{a}e\\u{9b}1mf\\u{202e}g\\u{2069}h";
        assert_eq!(safe(text, 100), shown);
        assert_eq!(safe("für 日本語 עברית 👩‍🚀", 100), "für 日本語 עברית 👩‍🚀");
        assert_eq!(lines("a\tb\nc\rd"), "a\tb\nc\\u{d}d");
    }

    #[test]
    fn long_texts_are_truncated() {
        assert_eq!(safe("12345", 5), "12345");
        assert_eq!(safe("123456", 5), "12345...");
        assert_eq!(safe(&"\u{202e}".repeat(900_000), 2), "\\u{202e}\\u{202e}...");
        assert_eq!(safe("x", 0), "...");
        assert_eq!(safe("", 0), "");
    }

    #[test]
    fn a_closed_output_is_not_an_error_but_other_failures_are() {
        assert!(unless_closed(Err(Closed.into())).is_ok());
        assert!(unless_closed(Err(anyhow::anyhow!("no space left"))).is_err());
        assert!(anyhow::Error::from(Closed).context("while printing").is::<Closed>());
    }

    #[test]
    fn safe_json_parses_to_the_same_value() {
        let value = serde_json::json!({"a\u{7f}": "x\u{1b}\u{9b}\u{202e}\u{2028}\n\"\\ü"});
        let safe = safe_json(&value.to_string());
        assert!(!safe.chars().any(is_harmful), "{safe}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&safe).unwrap(), value);
        let pretty = safe_json(&serde_json::to_string_pretty(&value).unwrap());
        assert_eq!(serde_json::from_str::<serde_json::Value>(&pretty).unwrap(), value);
    }
}
