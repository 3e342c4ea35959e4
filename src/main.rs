//! Parses the command line, loads the configuration, starts the runtime, gives the exit code.

use std::process::ExitCode;

use clap::Parser as _;
use standpipe::out;

mod cli;

fn main() -> ExitCode {
    let command = match cli::Cli::try_parse() {
        Ok(cli) => cli.command,
        Err(error) => {
            // --help and --version arrive here too, and are not mistakes.
            let code = if error.use_stderr() { cli::EX_USAGE } else { 0 };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    // The first thing that needs it decides otherwise, or panics.
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        out::note("standpipe: another TLS provider is installed already");
        return ExitCode::FAILURE;
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            out::note(format_args!("standpipe: the runtime cannot be started: {error}"));
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(cli::execute(command)).unwrap_or_else(|error| {
        if error.is::<out::Closed>() {
            return ExitCode::SUCCESS;
        }
        out::note(format_args!("standpipe: {error:#}"));
        ExitCode::FAILURE
    })
}
