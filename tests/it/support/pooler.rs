//! A pooler between the program and PostgreSQL.

use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{Postgres, free_port, wait_until};

const SOON: Duration = Duration::from_mins(1);

/// A private `PgBouncer` in front of a database. It is started again whenever it ends, as its systemd unit does: 1.18 exits with "bad
/// client state" when whoever cancels a query disconnects before it has passed that on (pgbouncer issue 801).
pub struct PgBouncer {
    child: Arc<Mutex<Child>>,
    over: Arc<AtomicBool>,
    port: u16,
    folder: tempfile::TempDir,
}

impl PgBouncer {
    /// Starts one in this `pool_mode`, with these additional lines in its configuration.
    pub async fn start(postgres: &Postgres, mode: &str, more: &str) -> Self {
        let folder = tempfile::Builder::new().prefix("standpipe-test-pgbouncer-").tempdir().unwrap();
        let port = free_port().unwrap();
        let file = folder.path().join("pgbouncer.ini");
        let ini = format!(
            "[databases]\n* = host=127.0.0.1 port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
             unix_socket_dir =\nauth_type = any\npool_mode = {mode}\ndefault_pool_size = 40\n{more}\n",
            postgres.port()
        );
        // With auth_type = any, PgBouncer connects to the server as the user in the database's line.
        std::fs::write(&file, ini.replace("* = host", "* = user=standpipe host")).unwrap();
        // Debian installs it outside the PATH of some users.
        let debian = Path::new("/usr/sbin/pgbouncer");
        let mut command = Command::new(if debian.exists() { debian } else { Path::new("pgbouncer") });
        if is_root() {
            // It refuses to run as root.
            let chown = Command::new("chown").args(["-R", "nobody"]).arg(folder.path()).status().unwrap();
            assert!(chown.success());
            command.args(["-u", "nobody"]);
        }
        command.arg(&file).stderr(std::fs::File::create(folder.path().join("log")).unwrap());
        let child = Arc::new(Mutex::new(command.spawn().expect("pgbouncer")));
        let over = Arc::new(AtomicBool::new(false));
        supervise(command, Arc::clone(&child), Arc::clone(&over));
        wait_until("PgBouncer to listen", SOON, async || {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()
        })
        .await;
        Self { child, over, port, folder }
    }

    /// The same database through it.
    pub fn url(&self, database: &str) -> String {
        let name = database.rsplit('/').next().unwrap();
        format!("postgres://standpipe@127.0.0.1:{}/{name}?sslmode=disable", self.port)
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{}", std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default());
        }
        self.over.store(true, Ordering::SeqCst);
        let mut child = self.child.lock().unwrap();
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// Starts it again whenever it ends, until it is over.
fn supervise(mut command: Command, child: Arc<Mutex<Child>>, over: Arc<AtomicBool>) {
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_millis(50));
            let mut child = child.lock().unwrap();
            if over.load(Ordering::SeqCst) {
                return;
            }
            if let Some(status) = child.try_wait().unwrap() {
                println!("PgBouncer ended ({status}) and is started again");
                *child = command.spawn().expect("pgbouncer");
            }
        }
    });
}

fn is_root() -> bool {
    String::from_utf8_lossy(&Command::new("id").arg("-u").output().unwrap().stdout).trim() == "0"
}
