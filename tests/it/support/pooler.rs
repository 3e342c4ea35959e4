//! A pooler between the program and PostgreSQL.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::{Postgres, free_port, wait_until};

const SOON: Duration = Duration::from_mins(1);

/// A private `PgBouncer` in front of a database.
pub struct PgBouncer {
    child: std::process::Child,
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
        let child = command
            .arg(&file)
            .stderr(std::fs::File::create(folder.path().join("log")).unwrap())
            .spawn()
            .expect("pgbouncer");
        wait_until("PgBouncer to listen", SOON, async || {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()
        })
        .await;
        Self { child, port, folder }
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
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_root() -> bool {
    String::from_utf8_lossy(&Command::new("id").arg("-u").output().unwrap().stdout).trim() == "0"
}
