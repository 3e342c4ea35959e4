//! Comparing a repository with the rows, and changing nothing: `standpipe repos verify`.

use std::sync::OnceLock;

use serde::Serialize;

use super::difference::Difference;
use super::fetch::Fetched;
use super::{Outcome, RepairError, Repairer};
use crate::origin::relay::decode::RepoOp;
use crate::store::Session;
use crate::store::repos::{Finished, Postponed};
use crate::verify::Repository;

/// What a comparison found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// The repository's revision.
    pub rev: String,
    /// The server that it came from.
    pub host: String,
    /// Its records.
    pub records: usize,
    /// Those that have a row which says too little to compare it: profiles, gates and labels, once the account has written
    /// something since.
    pub not_comparable: usize,
    /// Paths of records that the tables lack, or have in another version.
    pub missing: Vec<String>,
    /// Paths of rows whose record it does not have.
    pub surplus: Vec<String>,
}

impl Verdict {
    /// Whether the tables are what the repository says.
    #[must_use]
    pub fn is_equal(&self) -> bool {
        self.missing.is_empty() && self.surplus.is_empty()
    }
}

impl Repairer {
    /// Compares an account's repository, as its server shows it now, with its rows. The inner error says in words why it cannot be
    /// compared.
    ///
    /// # Errors
    ///
    /// PostgreSQL cannot be reached, or refuses.
    pub async fn verify(&self, session: &Session, did: &str) -> Result<Result<Verdict, String>, RepairError> {
        let Fetched { key, car, host } = match self.fetch(did, false, &OnceLock::new()).await {
            Ok(fetched) => fetched,
            Err(Outcome::Finished(Finished { message, .. })) => return Ok(Err(message.unwrap_or_default())),
            Err(Outcome::Postponed(Postponed { message, .. })) => return Ok(Err(message)),
        };
        let repository = match Repository::read(&car, did, &key) {
            Ok(repository) => repository,
            Err(invalid) => return Ok(Err(format!("{host}: {invalid}"))),
        };
        let rows = session.own_rows(did).await?;
        let mut difference = Difference::new(&repository, rows, &self.config.collections);
        let not_comparable = difference.without_blind();
        let (surplus, missing): (Vec<_>, Vec<_>) =
            difference.ops().into_iter().partition(|op| op.action == "delete");
        let paths = |ops: Vec<RepoOp<'_>>| ops.into_iter().map(|op| op.path.to_owned()).collect();
        Ok(Ok(Verdict {
            rev: repository.commit.rev.clone(),
            host,
            records: repository.records.len(),
            not_comparable,
            missing: paths(missing),
            surplus: paths(surplus),
        }))
    }
}
