//! A whole repository: signed by its account, every node and every record there.

use shrike::cbor::Cid;
use shrike::mst::DetachedTree;

use super::{Archive, Fault, Invalid, Key, SignedCommit};

/// The records of a repository, in bytes, that are compared.
const MAX_BYTES: usize = 64 * 1024 * 1024;

/// A repository that holds.
pub struct Repository<'a> {
    /// The signed object.
    pub commit: SignedCommit,
    /// Path and CID of every record, in the order of the tree.
    pub records: Vec<(String, Cid)>,
    /// The blocks.
    pub archive: Archive<'a>,
}

impl<'a> Repository<'a> {
    /// Reads what a server sent as the repository of `did`, whose key is `key`.
    ///
    /// # Errors
    ///
    /// It is cut off or malformed, another account's, signed by somebody else, or something is missing in it.
    pub fn read(car: &'a [u8], did: &str, key: &Key) -> Result<Self, Invalid> {
        let (archive, commit) = open(car)?;
        if commit.did != did {
            let message = format!("the repository is that of {}", commit.did);
            return Err(Invalid::new(Fault::Commit, message));
        }
        if !commit.is_signed_by(key) {
            let message = "the repository's signature is not that of the account's key";
            return Err(Invalid::new(Fault::Signature, message));
        }
        Self::whole(archive, commit)
    }

    /// Reads a repository without knowing its account's key: everything is there, and nobody knows who signed it.
    ///
    /// # Errors
    ///
    /// It is cut off or malformed, or something is missing in it.
    pub fn read_unsigned(car: &'a [u8]) -> Result<Self, Invalid> {
        let (archive, commit) = open(car)?;
        Self::whole(archive, commit)
    }

    fn whole(archive: Archive<'a>, commit: SignedCommit) -> Result<Self, Invalid> {
        let broken = |error| Invalid::new(Fault::Archive, format!("the repository is incomplete: {error}"));
        let records = DetachedTree::load(commit.data).entries(&archive).map_err(broken)?;
        if let Some((path, _)) = records.iter().find(|(_, cid)| archive.get(cid).is_none()) {
            let message = format!("the repository is incomplete: it lacks the record of {path}");
            return Err(Invalid::new(Fault::Archive, message));
        }
        // Many paths may name one record.
        let bytes: usize = records.iter().filter_map(|(_, cid)| archive.get(cid)).map(<[u8]>::len).sum();
        if bytes > MAX_BYTES {
            let message = format!("its records have {bytes} bytes; at most {MAX_BYTES} are compared");
            return Err(Invalid::new(Fault::Size, message));
        }
        Ok(Self { commit, records, archive })
    }
}

fn open(car: &[u8]) -> Result<(Archive<'_>, SignedCommit), Invalid> {
    let archive = Archive::read(car)?;
    let block = archive
        .get(&archive.root())
        .ok_or_else(|| Invalid::new(Fault::Archive, "the archive lacks the commit object"))?;
    let commit = SignedCommit::read(block)?;
    Ok((archive, commit))
}
