//! The version that `--version` prints: the package's, and the commit where it is known.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=STANDPIPE_COMMIT");
    let commit = std::env::var("STANDPIPE_COMMIT").ok().filter(|commit| !commit.is_empty()).or_else(from_git);
    let version = std::env::var("CARGO_PKG_VERSION").unwrap_or_default();
    let commit = commit.unwrap_or_default();
    println!("cargo:rustc-env=STANDPIPE_COMMIT={commit}");
    match commit.as_str() {
        "" => println!("cargo:rustc-env=STANDPIPE_VERSION={version}"),
        commit => println!("cargo:rustc-env=STANDPIPE_VERSION={version} ({commit})"),
    }
}

/// Nothing outside of a checkout of our own, as in an image or a package: then whoever builds may say it by
/// `STANDPIPE_COMMIT`.
fn from_git() -> Option<String> {
    // Grows with every commit and with every change of branch; a file that is not there would build anew each time.
    let log = Path::new(".git/logs/HEAD");
    if !log.exists() {
        return None;
    }
    println!("cargo:rerun-if-changed={}", log.display());
    let output = Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).output().ok()?;
    let commit = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && commit.bytes().all(|b| b.is_ascii_hexdigit())).then_some(commit)
}
