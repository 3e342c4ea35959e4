//! What is installed alongside the program: completions, manual pages, systemd units.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use standpipe::config::VARIABLES;

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_standpipe"));
    // Not even PATH: it needs no environment at all.
    command.args(arguments).env_clear().stdin(Stdio::null());
    command
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn printed(arguments: &[&str]) -> String {
    stdout(&command(arguments).output().unwrap())
}

/// The subcommands that the help of a command lists, except `help`.
fn subcommands(of: &[&str]) -> Vec<String> {
    printed(&[of, &["-h"]].concat())
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        // Lines that are indented further continue a description.
        .filter_map(|line| line.strip_prefix("  ").filter(|line| !line.starts_with(' ')))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .map(str::to_owned)
        .collect()
}

/// Every command and subcommand: `["run"]`, ..., `["dead-letters", "list"]`, ...
fn commands() -> Vec<Vec<String>> {
    let mut all = Vec::new();
    for name in subcommands(&[]) {
        let inner = subcommands(&[name.as_str()]);
        all.push(vec![name.clone()]);
        all.extend(inner.into_iter().map(|inner| vec![name.clone(), inner]));
    }
    assert!(all.len() > 20, "{all:?}");
    for known in ["run", "completions", "man"] {
        assert!(all.iter().any(|names| names.as_slice() == [known]), "{known}: {all:?}");
    }
    all
}

#[test]
fn the_completions_name_every_command() {
    let commands = commands();
    for shell in ["bash", "zsh", "fish"] {
        let script = printed(&["completions", shell]);
        let words: BTreeSet<&str> =
            script.split(|c: char| !c.is_ascii_alphanumeric() && !matches!(c, '-' | '_')).collect();
        for name in commands.iter().flatten() {
            assert!(words.contains(name.as_str()), "{shell} does not know {name}");
        }
    }
}

#[test]
fn bash_loads_its_completions_and_completes_a_command() {
    let script = printed(&["completions", "bash"]);
    let complete = "COMP_WORDS=(standpipe dead); COMP_CWORD=1; COMPREPLY=(); \
                    _standpipe standpipe dead standpipe; echo \"${COMPREPLY[*]}\"";
    let output = Command::new("bash")
        .args(["--norc", "-c", &format!("{script}\n{complete}")])
        // So that it does not complain about a locale that is missing here.
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(stdout(&output).trim(), "dead-letters");
}

#[test]
fn every_command_has_a_manual_page() {
    let folder = tempfile::tempdir().unwrap();
    let pages = folder.path().join("not/there/yet");
    assert_eq!(printed(&["man", pages.to_str().unwrap()]), "");
    let written: BTreeSet<String> = fs::read_dir(&pages)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let mut expected: BTreeSet<String> =
        commands().iter().map(|names| format!("standpipe-{}.1", names.join("-"))).collect();
    expected.insert("standpipe.1".to_owned());
    assert_eq!(written, expected);
    for name in &written {
        let page = fs::read_to_string(pages.join(name)).unwrap();
        assert!(
            page.contains("\n.TH standpipe")
                && page.contains(" 1 \"\" \"standpipe ")
                && page.contains("\n.SH NAME\n"),
            "{name}: {page}"
        );
    }
    assert_eq!(fs::read_to_string(pages.join("standpipe.1")).unwrap(), printed(&["man"]));
}

#[test]
fn the_main_manual_page_lists_every_command_and_variable() {
    let page = printed(&["man"]);
    for name in subcommands(&[]) {
        // A - on the page is \- in its source.
        let entry = format!("standpipe\\-{}(1)", name.replace('-', "\\-"));
        assert!(page.contains(&entry), "{entry} is missing:\n{page}");
    }
    for variable in VARIABLES {
        assert!(page.contains(&format!("\\fB{}\\fR", variable.name)), "{} is missing", variable.name);
    }
}

#[test]
fn a_folder_that_cannot_be_created_is_named_in_the_error() {
    let output = command(&["man", "/dev/null/pages"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("/dev/null/pages"), "{output:?}");
}

#[test]
fn a_closed_output_pipe_is_not_an_error() {
    for arguments in [&["completions", "bash"][..], &["completions", "fish"], &["man"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = command(arguments).stdout(writer).stderr(Stdio::piped()).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{arguments:?}: {output:?}");
    }
}

// ---------------------------------------------------------------------------------------------
// systemd

fn unit(name: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/systemd").join(name);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.lines().map(str::to_owned).collect()
}

fn setting<'a>(unit: &'a [String], name: &str) -> &'a str {
    let start = format!("{name}=");
    unit.iter()
        .find_map(|line| line.strip_prefix(&start))
        .unwrap_or_else(|| panic!("{name} is missing: {unit:?}"))
}

const UNITS: [&str; 3] = ["standpipe.service", "standpipe-reader.service", "standpipe-worker.service"];

#[test]
fn the_systemd_units_differ_only_in_what_they_run() {
    let own = |line: &&String| {
        let name = line.split('=').next().unwrap();
        let own = ["Description", "ExecStart", "Environment", "EnvironmentFile", "Conflicts", "After"];
        !own.contains(&name) && !line.starts_with('#')
    };
    let [run, reader, worker] = UNITS.map(unit);
    let shared: Vec<&String> = run.iter().filter(own).collect();
    assert_eq!(shared, reader.iter().filter(own).collect::<Vec<_>>());
    assert_eq!(shared, worker.iter().filter(own).collect::<Vec<_>>());
    for (unit, command) in [(&run, "run"), (&reader, "reader"), (&worker, "worker")] {
        assert_eq!(setting(unit, "ExecStart"), format!("/usr/bin/standpipe {command}"));
    }
}

#[test]
fn the_systemd_units_wait_for_the_drain_and_do_not_restart_on_bad_configuration() {
    let drain = VARIABLES.iter().find(|variable| variable.name == "DRAIN_TIMEOUT").unwrap().default;
    let drain = humantime::parse_duration(drain).unwrap();
    for name in UNITS {
        let unit = unit(name);
        assert!(humantime::parse_duration(setting(&unit, "TimeoutStopSec")).unwrap() > drain, "{name}");
        assert_eq!(setting(&unit, "Restart"), "on-failure", "{name}");
        assert_eq!(setting(&unit, "RestartPreventExitStatus"), "64", "{name}");
    }
}
