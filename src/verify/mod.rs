//! Whether a commit is what its account signed: pure, without a network or a clock of its own.
//!
//! The rules are those of the specification's message validation (<https://atproto.com/specs/sync>): sizes, revision,
//! archive, commit object, operations against the previous tree, signature.
//!
//! - `claim`: what a frame says about a commit
//! - `archive`: the blocks, each checked against its CID
//! - `commit`: the signed object
//! - `operations`: undoing the operations must give the previous tree
//! - `key`: an account's public key
//! - `repository`: a whole repository
//! - `document`: what of a DID document matters here
//! - `known`: what is remembered about an account

mod archive;
mod claim;
mod commit;
pub mod document;
mod key;
pub mod known;
mod operations;
mod repository;

use shrike::cbor::Cid;

pub use archive::Archive;
pub use claim::{Claim, ClaimedOp};
pub use commit::SignedCommit;
pub use key::{BadKey, Key};
pub use operations::undo;
pub use repository::Repository;

pub use crate::event::check_rev;

/// Maximum size of a commit's blocks (<https://atproto.com/specs/sync>).
pub const MAX_BLOCKS: usize = 2_000_000;
/// Maximum operations of a commit (<https://atproto.com/specs/sync>).
pub const MAX_OPS: usize = 200;
/// Maximum size of a record (<https://atproto.com/specs/repository>).
pub const MAX_RECORD: usize = 1_000_000;

/// Why something is conclusively not what its account signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// Larger than the protocol allows.
    Size,
    /// The revision is not a TID, or ahead of the clock.
    Revision,
    /// The archive cannot be read, or a block does not match its CID.
    Archive,
    /// The commit object is missing or says something else than the frame.
    Commit,
    /// Undoing the operations does not give the previous tree.
    Operations,
    /// The signature is not the account's.
    Signature,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Size, Self::Revision, Self::Archive, Self::Commit, Self::Operations, Self::Signature];

    /// The name in metrics and dead letters.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Size => "size",
            Self::Revision => "revision",
            Self::Archive => "archive",
            Self::Commit => "commit",
            Self::Operations => "operations",
            Self::Signature => "signature",
        }
    }
}

/// A fault with its details.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Invalid {
    /// What kind of fault.
    pub fault: Fault,
    /// In words.
    pub message: String,
}

impl Invalid {
    /// A fault in words.
    pub fn new(fault: Fault, message: impl Into<String>) -> Self {
        Self { fault, message: message.into() }
    }
}

/// A commit or `#sync` whose content holds; only the signature is left to check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sound {
    /// The signed object.
    pub commit: SignedCommit,
    /// Whether the operations were checked against the previous tree. They cannot be if the frame names none and the
    /// commit is not the first of its repository.
    pub inverted: bool,
}

/// Checks everything that can be checked without the account's key. `now_ms` is the time, in milliseconds since 1970.
///
/// # Errors
///
/// The first rule that does not hold, the cheapest ones first.
pub fn commit(claim: &Claim<'_>, now_ms: u64) -> Result<Sound, Invalid> {
    if claim.ops.len() > MAX_OPS {
        let message = format!("the commit has {} operations; at most {MAX_OPS} are allowed", claim.ops.len());
        return Err(Invalid::new(Fault::Size, message));
    }
    let (archive, commit) = signed_object(claim, now_ms)?;
    for op in &claim.ops {
        let Some(cid) = op.cid else { continue };
        match archive.get(&cid) {
            None => {
                let message = format!("the archive lacks the record of {}", op.path);
                return Err(Invalid::new(Fault::Archive, message));
            }
            Some(record) if record.len() > MAX_RECORD => {
                let message = format!(
                    "the record of {} has {} bytes; at most {MAX_RECORD} are allowed",
                    op.path,
                    record.len()
                );
                return Err(Invalid::new(Fault::Size, message));
            }
            Some(_) => {}
        }
    }
    let inverted = undo(claim, &archive, commit.data)?;
    Ok(Sound { commit, inverted })
}

/// Checks a `#sync`: its archive holds the commit object alone.
///
/// # Errors
///
/// The first rule that does not hold.
pub fn sync(claim: &Claim<'_>, now_ms: u64) -> Result<Sound, Invalid> {
    let (_, commit) = signed_object(claim, now_ms)?;
    Ok(Sound { commit, inverted: true })
}

fn signed_object<'a>(claim: &Claim<'a>, now_ms: u64) -> Result<(Archive<'a>, SignedCommit), Invalid> {
    if claim.blocks.len() > MAX_BLOCKS {
        let message =
            format!("the blocks have {} bytes; at most {MAX_BLOCKS} are allowed", claim.blocks.len());
        return Err(Invalid::new(Fault::Size, message));
    }
    check_rev(claim.rev, now_ms).map_err(|message| Invalid::new(Fault::Revision, message))?;
    let archive = Archive::read(claim.blocks)?;
    let root = archive.root();
    if claim.commit.is_some_and(|commit| commit != root) {
        return Err(Invalid::new(
            Fault::Archive,
            "the archive's root is not the commit that the frame names",
        ));
    }
    let block = archive
        .get(&root)
        .ok_or_else(|| Invalid::new(Fault::Archive, "the archive lacks the commit object"))?;
    let commit = SignedCommit::read(block)?;
    if commit.did != claim.did {
        let message = format!("the commit object is about {}, the frame about {}", commit.did, claim.did);
        return Err(Invalid::new(Fault::Commit, message));
    }
    if commit.rev != claim.rev {
        let message = format!("the commit object has revision {}, the frame {}", commit.rev, claim.rev);
        return Err(Invalid::new(Fault::Commit, message));
    }
    Ok((archive, commit))
}

/// The CID as short text for messages.
fn shown(cid: Option<Cid>) -> String {
    cid.map_or_else(|| "nothing".to_owned(), |cid| cid.to_string())
}
