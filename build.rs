//! The version that `--version` prints: the package's, and the commit where it is known. And the lists of the files in
//! `sql/migrations` and `sql/apply`: what is in the folder is what is run, in the order of the names.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    list_sql().expect("the lists of SQL files");
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

/// Writes `MIGRATIONS` (`0001_tables.sql` is version 1, tables) and `FUNCTIONS`.
fn list_sql() -> std::io::Result<()> {
    let mut lists = "const MIGRATIONS: &[(i32, &str, &str)] = &[\n".to_owned();
    for (number, file) in (1..).zip(sql_files("migrations")?) {
        let name = file.file_stem().unwrap_or_default().to_string_lossy();
        let (version, name) = name.split_once('_').unwrap_or_default();
        let version: i32 = version.parse().expect("a migration is named <version>_<name>.sql");
        assert_eq!(version, number, "migrations are numbered without gaps, and no number twice");
        let _ = writeln!(lists, "    ({version}, {name:?}, include_str!({:?})),", file.display().to_string());
    }
    lists.push_str("];\nconst FUNCTIONS: &[&str] = &[\n");
    for file in sql_files("apply")? {
        let _ = writeln!(lists, "    include_str!({:?}),", file.display().to_string());
    }
    lists.push_str("];\n");
    std::fs::write(Path::new(&std::env::var_os("OUT_DIR").unwrap_or_default()).join("sql.rs"), lists)
}

/// The files of a folder below `sql`, in the order of their names.
fn sql_files(folder: &str) -> std::io::Result<Vec<PathBuf>> {
    let folder =
        Path::new(&std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default()).join("sql").join(folder);
    println!("cargo:rerun-if-changed={}", folder.display());
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "sql") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
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
