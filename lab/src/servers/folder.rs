//! The folder of a server: who may use it, one server at a time, and its end.

use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::user::ServerUser;

/// Creates the folder if need be, gives it to the user that the server runs as, and returns its
/// full path with links resolved, which is how `/proc` and PostgreSQL show it.
pub(super) fn prepare_folder(folder: &Path, user: Option<&ServerUser>) -> Result<PathBuf> {
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    let folder = fs::canonicalize(folder).with_context(|| format!("looking at {}", folder.display()))?;
    let Some(user) = user else {
        return Ok(folder);
    };
    for parent in folder.ancestors().skip(1) {
        let metadata = fs::metadata(parent).with_context(|| format!("looking at {}", parent.display()))?;
        ensure!(
            user.may_enter(&metadata),
            "started by root, the server runs as {}, which may not enter {}; choose a folder below /tmp, or start \
             this as an ordinary user",
            user.name,
            parent.display()
        );
    }
    user.own(&folder)?;
    Ok(folder)
}

/// Makes sure that one folder serves one server at a time: two would ruin its data, and the end
/// of one would take the other's processes with it. Released when the file is closed, so also
/// when this process dies.
pub(super) fn lock_folder(folder: &Path, name: &str) -> Result<File> {
    let path = folder.join(name);
    let lock = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    lock.try_lock()
        .with_context(|| format!("the folder {} is in use by another private server", folder.display()))?;
    Ok(lock)
}

/// A fresh folder for private servers below the system's folder for temporary files. It is
/// removed when the value is dropped, and also when this process ends in any other way.
#[derive(Debug)]
pub struct PrivateFolder {
    path: PathBuf,
    sweeper: Child,
}

impl PrivateFolder {
    /// Creates the folder `<prefix>-<random>`.
    ///
    /// # Errors
    /// When it cannot be created, or no shell can be started.
    pub fn create(prefix: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("{prefix}-{:016x}", fastrand::u64(..)));
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("creating {}", path.display()))?;
        // Others may go through it, because servers started by root run as somebody else; set
        // apart from the creation, where the umask would have a say.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o711))?;
        let path = fs::canonicalize(&path)?;
        // Its standard input ends when we do. Servers may still be writing at that moment, so
        // it tries more than once.
        let script = "while read -r line; do :; done; for n in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do \
                      [ -e \"$0\" ] || exit 0; rm -rf -- \"$0\"; sleep 1; done";
        let sweeper = Command::new("sh")
            .args(["-c", script])
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .current_dir("/")
            .process_group(0)
            .spawn()
            .context("starting a shell")?;
        Ok(Self { path, sweeper })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for PrivateFolder {
    fn drop(&mut self) {
        // An error cannot be reported here; the sweeper tries again.
        let _ = fs::remove_dir_all(&self.path);
        drop(self.sweeper.stdin.take());
        let _ = self.sweeper.wait();
    }
}
