//! Private Redis, PostgreSQL and RabbitMQ servers: started in a folder of their own on a free port of
//! 127.0.0.1, never the machine's own services. The tests, the demo and the
//! benchmark use them.
//!
//! What they promise:
//!
//! - `start` returns when the server really answers, and fails with the end of its log.
//! - Started by root they run as an ordinary user (`postgres`, else `nobody`), because
//!   PostgreSQL refuses to run as root.
//! - They end with this process, however it ends. Dropping the value stops the server; if the
//!   process is killed, the kernel sends the server the signal that `setpriv --pdeathsig` asked
//!   for. That signal is tied to the *thread* that started the server, and the threads of an
//!   async runtime come and go, so [`spawn_for_life`] starts everything from one thread that
//!   lives as long as the process.
//! - They have a process group of their own: Ctrl-C at a terminal reaches this process, which
//!   can then finish its work with the servers still there.
//!
//! They ask for no password, so anybody with an account on the machine can connect while
//! they run: nothing worth hiding belongs in them.

mod folder;
mod postgres;
mod process;
mod rabbitmq;
mod redis;
mod user;

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

pub use folder::PrivateFolder;
pub use postgres::{PostgresOptions, PrivatePostgres};
pub use process::{Signal, command_for_life, send_signal, spawn_for_life};
pub use rabbitmq::PrivateRabbitMq;
pub use redis::{AppendFsync, PrivateRedis, RedisOptions};

/// The time between two looks at a condition that is waited for.
const POLL: Duration = Duration::from_millis(10);
/// How long a server may take to answer after its start.
const START_DEADLINE: Duration = Duration::from_secs(20);
/// How long it may take when it says that it is reading its data back.
const RECOVERY_DEADLINE: Duration = Duration::from_mins(2);
/// How long a server may take to stop.
const STOP_DEADLINE: Duration = Duration::from_secs(30);
/// How many ports are tried when somebody else takes the chosen one before the server does.
const PORT_TRIES: u32 = 3;
/// How much of a log is shown in an error.
const LOG_TAIL_BYTES: u64 = 4096;

/// A port of 127.0.0.1 that is not in use.
///
/// It lies below the range from which the kernel takes the ports of outgoing connections. A port
/// inside that range can be taken by any client while the server is down, even by one that
/// tries to connect to it (which then talks to itself), and the server could not come back.
///
/// # Errors
/// When no port can be bound.
pub fn free_port() -> Result<u16> {
    let first_ephemeral = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")
        .ok()
        .and_then(|range| range.split_whitespace().next()?.parse::<u16>().ok())
        .unwrap_or(32768);
    if first_ephemeral > 12_000 {
        for _ in 0..100 {
            let port = fastrand::u16(10_000..first_ephemeral);
            if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
                return Ok(port);
            }
        }
    }
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("looking for a free port")?;
    Ok(listener.local_addr()?.port())
}

fn find_on_path(program: &str) -> Option<PathBuf> {
    // PATH is not a setting of ours, so it is not read with the configuration.
    std::env::split_paths(&std::env::var_os("PATH")?).map(|folder| folder.join(program)).find(|candidate| {
        fs::metadata(candidate).is_ok_and(|found| found.is_file() && found.mode() & 0o111 != 0)
    })
}
