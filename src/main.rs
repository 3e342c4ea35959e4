//! Parses the command line, starts the runtime, and returns the exit code.

use std::process::ExitCode;

use clap::Parser as _;
use standpipe::out;

mod cli;

fn main() -> ExitCode {
    let command = match cli::Cli::try_parse() {
        Ok(cli) => cli.command,
        Err(error) => {
            // --help and --version arrive here, too, and are not errors.
            let code = if error.use_stderr() { cli::EX_USAGE } else { 0 };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    // Otherwise the first user of TLS would choose a provider, or panic.
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
