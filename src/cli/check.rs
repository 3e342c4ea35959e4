//! `standpipe check`: examines everything that the program depends on.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use anyhow::Result;
use standpipe::config::{Role, no_colour};
use standpipe::{doctor, out};

use super::{EX_UNAVAILABLE, load};

/// Prints the findings and their remedies.
///
/// # Errors
///
/// The output cannot be written.
pub async fn check(json: bool) -> Result<ExitCode> {
    let (config, warnings) = match load(Role::Tool) {
        Ok(loaded) => loaded,
        Err(code) => return Ok(code),
    };
    let examination = doctor::check(&config, &warnings).await;
    if json {
        out::unless_closed(out::line(out::safe_json(&serde_json::to_string(&examination)?)))?;
    } else {
        let terminal = std::io::stdout().is_terminal();
        let columns = terminal_size::terminal_size_of(std::io::stdout()).map(|(columns, _)| columns.0.into());
        let page = examination.page(terminal && !no_colour(), columns) + "\n";
        out::unless_closed(out::raw(&page))?;
    }
    Ok(match examination.verdict {
        doctor::Verdict::Healthy => ExitCode::SUCCESS,
        doctor::Verdict::Unhealthy => ExitCode::FAILURE,
        doctor::Verdict::Unreachable => ExitCode::from(EX_UNAVAILABLE),
    })
}
