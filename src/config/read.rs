//! Parses the environment's values and collects every problem.

use std::ffi::OsString;
use std::fmt;

use super::settings::{Parsed, Raw};
use super::{CaFile, Config, DatabaseUrl, Role, VARIABLES, VerifyMode, rules};

/// Everything that is wrong with the environment; displayed as one line per problem.
#[derive(Debug, thiserror::Error)]
#[error("{}", self.lines())]
pub struct ConfigError {
    /// In the order of [`VARIABLES`]; never empty.
    pub problems: Vec<Problem>,
    /// Warnings, such as a name that looks like one of ours: one may be the cause.
    pub warnings: Vec<String>,
}

impl ConfigError {
    /// What to print for the operator, line by line.
    pub fn report(&self) -> impl Iterator<Item = String> + '_ {
        // The warnings too: one may be the cause.
        std::iter::once("standpipe: the configuration cannot be used:".to_owned())
            .chain(self.problems.iter().flat_map(|problem| {
                problem.to_string().lines().map(|line| format!("  {line}")).collect::<Vec<_>>()
            }))
            .chain(self.warnings.iter().map(|warning| format!("  warning: {warning}")))
    }

    fn lines(&self) -> String {
        self.problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    }
}

/// One variable, or one combination, that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The variable to change.
    pub variable: &'static str,
    /// The problem and the remedy, without any secret.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.variable, self.message)
    }
}

/// Reads the configuration from `vars`, usually `std::env::vars_os()`.
///
/// Returns the configuration with warnings that the caller should log, or every problem at once.
///
/// # Errors
///
/// [`ConfigError`] when any variable is malformed, a required one is missing, or a combination is unsafe.
pub fn from_env<K, V>(
    vars: impl IntoIterator<Item = (K, V)>,
    role: Role,
) -> Result<(Config, Vec<String>), ConfigError>
where
    K: Into<OsString>,
    V: Into<OsString>,
{
    let mut read = Reading { problems: Vec::new(), warnings: Vec::new() };
    let mut ours: Vec<(String, String)> = Vec::new();
    let mut host = None;
    for (name, value) in vars {
        // A name that is not UTF-8 is neither ours nor similar to one of ours.
        let Ok(name) = name.into().into_string() else {
            continue;
        };
        let value = value.into();
        if let Some(variable) = VARIABLES.iter().find(|v| v.name == name) {
            match value.into_string() {
                Ok(text) if text.trim().is_empty() => {}
                Ok(text) => {
                    ours.retain(|(earlier, _)| *earlier != name);
                    ours.push((name, text.trim().to_owned()));
                }
                Err(_) => read
                    .problem(variable.name, "is not valid UTF-8; write it in UTF-8 (not shown)".to_owned()),
            }
        } else if name == "HOSTNAME" {
            host = value.into_string().ok().filter(|text| !text.trim().is_empty());
        } else if let Some(meant) = did_you_mean(&name) {
            read.warnings
                .push(format!("{name} is not a variable of standpipe and is ignored: did you mean {meant}?"));
        }
    }
    read.warnings.sort();

    // envy stops at the first field that it cannot parse and prints its value, so it only assigns texts to
    // fields here; an optional text cannot fail.
    let mut raw: Raw = match envy::from_iter(ours) {
        Ok(raw) => raw,
        Err(error) => {
            read.problem("environment", format!("could not be read ({error})"));
            return Err(ConfigError { problems: read.problems, warnings: read.warnings });
        }
    };
    raw.consumer_id.get_or_insert_with(|| host_name(host.as_deref()));
    // The URL's own parameter wins, as with libpq.
    let in_url = raw.database_url.as_deref().and_then(DatabaseUrl::root_cert_of);
    if in_url.is_some() {
        raw.pgsslrootcert = None;
    }
    let mut parsed = Parsed::new(&raw, &mut read);
    if let Some(path) = in_url {
        parsed.database_ca = read.take("DATABASE_URL", Some(&path), CaFile::parse);
    }
    rules::refuse(&parsed, role, &mut read);
    match parsed.complete() {
        Some(mut config) if read.problems.is_empty() => {
            read.warnings.extend(rules::warnings(&config, role));
            if config.relay_url.is_jetstream() {
                config.verify = VerifyMode::Off;
            }
            Ok((config, read.warnings))
        }
        _ => {
            read.problems.sort_by_key(|problem| VARIABLES.iter().position(|v| v.name == problem.variable));
            Err(ConfigError { problems: read.problems, warnings: read.warnings })
        }
    }
}

/// A problem with a value, and the remedy. The variable's name and its value are added by
/// [`Reading`].
pub(super) struct Wrong {
    pub(super) what: String,
    pub(super) right: String,
}

impl Wrong {
    pub(super) fn new(what: impl Into<String>, right: impl Into<String>) -> Self {
        Self { what: what.into(), right: right.into() }
    }
}

/// Collects problems while the variables are parsed one by one.
pub(super) struct Reading {
    problems: Vec<Problem>,
    warnings: Vec<String>,
}

impl Reading {
    pub(super) fn problem(&mut self, variable: &'static str, message: String) {
        self.problems.push(Problem { variable, message });
    }

    /// Parses the given text or, if there is none, the variable's default. `None` if that fails; the problem is then in
    /// the list.
    pub(super) fn take<T>(
        &mut self,
        name: &'static str,
        given: Option<&str>,
        parse: impl FnOnce(&str) -> Result<T, Wrong>,
    ) -> Option<T> {
        let variable = VARIABLES.iter().find(|v| v.name == name)?;
        let text = given.unwrap_or(variable.default);
        let quoted = ['"', '\''].iter().any(|quote| text.starts_with(*quote) && text.ends_with(*quote));
        let parsed = if quoted {
            // Shells remove them, but container env files mostly do not.
            Err(Wrong::new("has quotation marks around it", "remove them"))
        } else {
            parse(text)
        };
        match parsed {
            Ok(value) => Some(value),
            Err(Wrong { what, right }) => {
                let value = if variable.secret { String::new() } else { format!("{} ", shown(text)) };
                self.problem(name, format!("{value}{what}; {right}"));
                None
            }
        }
    }

    pub(super) fn is_wrong(&self, variable: &str) -> bool {
        self.problems.iter().any(|problem| problem.variable == variable)
    }
}

/// A non-secret variable's value, quoted, on one line and shortened. A value that looks like a misplaced secret is not
/// shown.
pub(super) fn shown(value: &str) -> String {
    if value.contains("://") || value.contains('@') || value.to_ascii_lowercase().contains("password") {
        return "(value not shown)".to_owned();
    }
    match value.char_indices().nth(60) {
        Some((end, _)) => format!("{:?}...", &value[..end]),
        None => format!("{value:?}"),
    }
}

/// The host name, which mostly survives restarts; HOSTNAME is exported by containers, but rarely by
/// shells.
fn host_name(variable: Option<&str>) -> String {
    let file = || std::fs::read_to_string("/etc/hostname").ok();
    let name = variable.map(str::to_owned).or_else(file).unwrap_or_default();
    match name.trim() {
        "" => "standpipe".to_owned(),
        name => name.to_owned(),
    }
}

/// Names that are similar to one of ours, but belong to other programs.
const FOREIGN: &[&str] = &["BATCH_TIME", "REDIS_SSL", "REDIS_TTL", "RUSTC_LOG"];

/// The variable that may have been meant by `name`, which is not one of ours.
fn did_you_mean(name: &str) -> Option<&'static str> {
    if FOREIGN.contains(&name) {
        return None;
    }
    let limit = if name.len() < 6 { 1 } else { 2 };
    let upper = name.to_ascii_uppercase();
    VARIABLES
        .iter()
        .filter(|v| v.name.len().abs_diff(upper.len()) <= limit)
        .map(|v| (edits(upper.as_bytes(), v.name.as_bytes()), v.name))
        .filter(|(distance, _)| *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, meant)| meant)
}

/// The number of letters to insert, remove, replace or swap with their neighbour to turn `a` into `b`
/// (Damerau-Levenshtein, optimal string alignment).
pub(super) fn edits(a: &[u8], b: &[u8]) -> usize {
    let mut rows: [Vec<usize>; 3] = [Vec::new(), Vec::new(), (0..=b.len()).collect()];
    for (i, &from) in a.iter().enumerate() {
        rows.rotate_left(1);
        let [before, above, row] = &mut rows;
        row.clear();
        row.push(i + 1);
        for (j, &to) in b.iter().enumerate() {
            let mut least = (above[j] + usize::from(from != to)).min(above[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && from == b[j - 1] && a[i - 1] == to {
                least = least.min(before[j - 1] + 1);
            }
            row.push(least);
        }
    }
    rows[2].last().copied().unwrap_or_default()
}
