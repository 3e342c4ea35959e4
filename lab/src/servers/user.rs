//! The unprivileged user that servers run as when root starts them.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

use anyhow::{Context, Result};

/// The user that servers run as when we are root.
#[derive(Debug, Clone)]
pub(super) struct ServerUser {
    pub(super) name: String,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl ServerUser {
    /// `None` when we are an ordinary user: the servers run as we do.
    pub(super) fn to_run_as() -> Result<Option<Self>> {
        let status = fs::read_to_string("/proc/self/status").context("reading /proc/self/status")?;
        let effective = status
            .lines()
            .find_map(|line| line.strip_prefix("Uid:"))
            .and_then(|ids| ids.split_whitespace().nth(1))
            .context("/proc/self/status has no Uid line")?;
        if effective != "0" {
            return Ok(None);
        }
        let passwd = fs::read_to_string("/etc/passwd").context("reading /etc/passwd")?;
        let find = |wanted: &str| {
            passwd.lines().find_map(|line| {
                let fields: Vec<&str> = line.split(':').collect();
                match fields[..] {
                    [name, _, uid, gid, ..] if name == wanted => {
                        Some(Self { name: name.to_owned(), uid: uid.parse().ok()?, gid: gid.parse().ok()? })
                    }
                    _ => None,
                }
            })
        };
        find("postgres")
            .or_else(|| find("nobody"))
            .map(Some)
            .context("started by root, servers run as the user postgres or nobody, and there is neither")
    }

    pub(super) fn own(&self, path: &Path) -> Result<()> {
        chown(path, Some(self.uid), Some(self.gid))
            .with_context(|| format!("giving {} to {}", path.display(), self.name))
    }

    /// Whether this user may go through a folder.
    pub(super) fn may_enter(&self, folder: &fs::Metadata) -> bool {
        let bit = if folder.uid() == self.uid {
            0o100
        } else if folder.gid() == self.gid {
            0o010
        } else {
            0o001
        };
        folder.mode() & bit != 0
    }
}
