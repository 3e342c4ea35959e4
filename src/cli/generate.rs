//! `standpipe completions` and `standpipe man`: files installed alongside the program, generated from the command line.

use std::fs;
use std::io::{self, ErrorKind, Write as _};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{CommandFactory as _, ValueEnum};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};
use standpipe::config::VARIABLES;

use super::{Cli, EX_UNAVAILABLE, EX_USAGE};

const PROGRAM: &str = env!("CARGO_PKG_NAME");

/// The shells that completions exist for.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// Prints the shell's completion script.
///
/// # Errors
///
/// The output cannot be written.
pub fn completions(shell: Shell) -> Result<ExitCode> {
    let shell = match shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), PROGRAM, &mut script);
    print(&script)
}

/// Prints the program's manual page, or writes one for each command into the folder.
///
/// # Errors
///
/// The output, or a file, cannot be written.
pub fn man(folder: Option<&Path>) -> Result<ExitCode> {
    // A page about `help` would be useless.
    let mut program = Cli::command().disable_help_subcommand(true);
    // Gives the subcommands their full names.
    program.build();
    let Some(folder) = folder else {
        return print(&page(&program)?);
    };
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    write_pages(&program, folder)?;
    Ok(ExitCode::SUCCESS)
}

fn write_pages(command: &clap::Command, folder: &Path) -> Result<()> {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name());
    let file = folder.join(format!("{name}.1"));
    fs::write(&file, page(command)?).with_context(|| file.display().to_string())?;
    for subcommand in command.get_subcommands() {
        write_pages(subcommand, folder)?;
    }
    Ok(())
}

fn page(command: &clap::Command) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    let source = format!("{PROGRAM} {}", env!("CARGO_PKG_VERSION"));
    // No date, but quoted: an unquoted empty argument would vanish and shift the following ones.
    Man::new(command.clone()).date("\"\"").source(source).manual(PROGRAM).render(&mut text)?;
    let rest = if command.get_name() == PROGRAM { about_the_program() } else { pointer_to_the_program() };
    rest.to_writer(&mut text)?;
    Ok(text)
}

/// Sections that clap does not generate.
fn about_the_program() -> Roff {
    let mut page = Roff::new();
    page.control("SH", ["ENVIRONMENT"]);
    for variable in VARIABLES {
        let default = match variable.default {
            "" => "no default".to_owned(),
            default => format!("default: {default}"),
        };
        page.control("TP", []);
        page.text([bold(variable.name)]);
        page.text([roman(format!("{} ({default})", variable.meaning))]);
    }
    page.control("SH", ["EXIT STATUS"]);
    for (code, meaning) in [
        (0, "fine"),
        (1, "failed at its work"),
        (EX_USAGE, "bad command line or configuration"),
        (EX_UNAVAILABLE, "a service that it needs cannot be reached"),
    ] {
        page.control("TP", []);
        page.text([bold(code.to_string())]);
        page.text([roman(meaning)]);
    }
    page
}

fn pointer_to_the_program() -> Roff {
    let mut page = Roff::new();
    page.control("SH", ["SEE ALSO"]);
    page.text([bold(PROGRAM), roman("(1), for the environment variables and the exit status")]);
    page
}

fn print(text: &[u8]) -> Result<ExitCode> {
    let mut out = io::stdout().lock();
    match out.write_all(text).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error).context("standard output"),
        // A closed pipe, as after head, is not an error.
        _ => Ok(ExitCode::SUCCESS),
    }
}
