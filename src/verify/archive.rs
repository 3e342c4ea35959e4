//! A CAR archive in memory (<https://ipld.io/specs/transport/car/carv1/>), each block checked against its CID.

use std::borrow::Cow;
use std::collections::HashMap;

use shrike::car::SliceReader;
use shrike::cbor::Cid;
use shrike::mst::{BlockSource, MstError};

use super::{Fault, Invalid};

/// An archive that is whole.
pub struct Archive<'a> {
    root: Cid,
    blocks: HashMap<Cid, &'a [u8]>,
}

impl<'a> Archive<'a> {
    /// Reads all of it.
    ///
    /// # Errors
    ///
    /// It is cut off or malformed, has no root, or has a block that is not what its CID says.
    pub fn read(car: &'a [u8]) -> Result<Self, Invalid> {
        let unreadable = |error| Invalid::new(Fault::Archive, format!("the archive is unreadable: {error}"));
        let reader = SliceReader::new(car).map_err(unreadable)?;
        let Some(&root) = reader.roots().first() else {
            return Err(Invalid::new(Fault::Archive, "the archive has no root"));
        };
        let mut blocks = HashMap::new();
        for block in reader {
            let block = block.map_err(unreadable)?;
            if Cid::compute(block.cid.codec(), block.data) != block.cid {
                let message = format!("the bytes of block {} do not match it", block.cid);
                return Err(Invalid::new(Fault::Archive, message));
            }
            blocks.insert(block.cid, block.data);
        }
        Ok(Self { root, blocks })
    }

    /// Its first root.
    #[must_use]
    pub fn root(&self) -> Cid {
        self.root
    }

    /// All blocks.
    #[must_use]
    pub(crate) fn blocks(&self) -> &HashMap<Cid, &'a [u8]> {
        &self.blocks
    }

    /// A block.
    #[must_use]
    pub fn get(&self, cid: &Cid) -> Option<&'a [u8]> {
        self.blocks.get(cid).copied()
    }
}

impl BlockSource for Archive<'_> {
    fn read_block(&self, cid: &Cid) -> Result<Option<Cow<'_, [u8]>>, MstError> {
        Ok(self.get(cid).map(Cow::Borrowed))
    }
}
