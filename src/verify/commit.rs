//! The signed object at the root of a repository (<https://atproto.com/specs/repository#commit-objects>).

use shrike::cbor::{Cid, Codec, Value, decode, encode_value};

use super::{Fault, Invalid, Key};

/// A commit object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedCommit {
    /// The account.
    pub did: String,
    /// The revision.
    pub rev: String,
    /// The root of the tree.
    pub data: Cid,
    /// What is signed: the SHA-256 of the object without its signature.
    pub hash: [u8; 32],
    /// The signature.
    pub signature: [u8; 64],
}

impl SignedCommit {
    /// Reads a commit object.
    ///
    /// # Errors
    ///
    /// It is something else, of another version, or lacks a field.
    pub fn read(block: &[u8]) -> Result<Self, Invalid> {
        let wrong = |what: &str| Invalid::new(Fault::Commit, format!("the commit object {what}"));
        let Ok(Value::Map(mut fields)) = decode(block) else {
            return Err(wrong("is not a map in DAG-CBOR"));
        };
        let field = |name: &str| fields.iter().find(|(key, _)| *key == name).map(|(_, value)| value);
        if field("version") != Some(&Value::Unsigned(3)) {
            return Err(wrong("is not of version 3"));
        }
        let (Some(Value::Text(did)), Some(Value::Text(rev)), Some(Value::Cid(data))) =
            (field("did"), field("rev"), field("data"))
        else {
            return Err(wrong("lacks did, rev or data"));
        };
        let Some(Value::Bytes(signature)) = field("sig") else {
            return Err(wrong("has no signature"));
        };
        let signature =
            <[u8; 64]>::try_from(*signature).map_err(|_| wrong("has a signature that is not of 64 bytes"))?;
        let (did, rev, data) = ((*did).to_owned(), (*rev).to_owned(), *data);
        fields.retain(|(key, _)| *key != "sig");
        let unsigned =
            encode_value(&Value::Map(fields)).map_err(|error| wrong(&format!("is unreadable: {error}")))?;
        let hash = *Cid::compute(Codec::Drisl, &unsigned).hash();
        Ok(Self { did, rev, data, hash, signature })
    }

    /// Whether the signature is that of `key`.
    #[must_use]
    pub fn is_signed_by(&self, key: &Key) -> bool {
        key.verify_hash(&self.hash, &self.signature)
    }
}
