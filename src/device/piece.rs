//! What a copy of more than one range consists of: pieces of any size anywhere, or rows of one size
//! at equal distances.

use crate::error::{Error, Result};

/// One piece of a scattered copy; the layout is what copy kernels read.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub destination: u64,
    pub source: u64,
    pub bytes: u64,
}

impl Piece {
    /// What [`super::Device::copy_pieces`] copies fast as one piece, bytes: enough for the bus, and few
    /// enough that the threads of a device share a copy evenly.
    pub const TILE: u64 = 16 << 10;

    /// This piece cut into pieces of at most [`Self::TILE`] bytes, each but the first with a
    /// destination at a multiple of 128. Nothing for a piece of no bytes.
    pub fn tiles(self) -> impl Iterator<Item = Piece> {
        let mut rest = self;
        std::iter::from_fn(move || {
            if rest.bytes == 0 {
                return None;
            }
            let past = rest.destination % 128;
            let bytes = rest.bytes.min(Piece::TILE - past);
            let tile = Piece { bytes, ..rest };
            rest = Piece {
                destination: rest.destination + bytes,
                source: rest.source + bytes,
                bytes: rest.bytes - bytes,
            };
            Some(tile)
        })
    }
}

/// A copy of `height` rows of `width` bytes each, which begin `pitch` bytes apart on either side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pitched {
    pub destination: u64,
    pub destination_pitch: u64,
    pub source: u64,
    pub source_pitch: u64,
    pub width: u64,
    pub height: u64,
}

impl Pitched {
    /// Whether any byte is copied.
    pub fn is_empty(&self) -> bool {
        self.width == 0 || self.height == 0
    }

    /// The rows, first to last. Only for a copy that passed [`Self::check`].
    pub fn rows(self) -> impl Iterator<Item = Piece> {
        (0..self.height).map(move |row| Piece {
            destination: self.destination + row * self.destination_pitch,
            source: self.source + row * self.source_pitch,
            bytes: self.width,
        })
    }

    /// An error that names the argument if rows overlap or go beyond the last address.
    pub fn check(&self) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let sides = [
            ("destination", self.destination, self.destination_pitch),
            ("source", self.source, self.source_pitch),
        ];
        for (name, start, pitch) in sides {
            if self.height > 1 && pitch < self.width {
                let why = format!("{pitch} is less than the width, {}", self.width);
                return Err(Error::invalid(&format!("{name}_pitch"), why));
            }
            let extent = (self.height - 1)
                .checked_mul(pitch)
                .and_then(|last| last.checked_add(self.width))
                .and_then(|extent| start.checked_add(extent));
            if extent.is_none() {
                let why = format!("{} rows go beyond the last address", self.height);
                return Err(Error::invalid(name, why));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn tiles_make_up_the_piece() {
        for (destination, bytes) in [(0, 0), (1, 1), (127, 16384), (128, 1 << 20), (77, 99_999)] {
            let source = 5000;
            let piece = Piece {
                destination,
                source,
                bytes,
            };
            let mut at = 0;
            for tile in piece.tiles() {
                assert_eq!(
                    (tile.destination, tile.source),
                    (destination + at, source + at)
                );
                assert!(at == 0 || tile.destination % 128 == 0);
                assert!((1..=Piece::TILE).contains(&tile.bytes));
                at += tile.bytes;
            }
            assert_eq!(at, bytes);
            assert!(piece.tiles().count() as u64 <= bytes / Piece::TILE + 2);
        }
    }

    #[test]
    fn rows_that_cannot_be_name_their_argument() {
        let good = Pitched {
            destination: 1000,
            destination_pitch: 64,
            source: 2000,
            source_pitch: 64,
            width: 64,
            height: 3,
        };
        good.check().unwrap();
        let starts: Vec<_> = good
            .rows()
            .map(|row| (row.destination, row.source))
            .collect();
        assert_eq!(starts, [(1000, 2000), (1064, 2064), (1128, 2128)]);
        let refused = |copy: Pitched, named: &str| {
            let error = copy.check().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(error.to_string().starts_with(named), "{error}");
        };
        refused(
            Pitched {
                destination_pitch: 63,
                ..good
            },
            "destination_pitch: ",
        );
        refused(
            Pitched {
                source_pitch: 0,
                ..good
            },
            "source_pitch: ",
        );
        refused(
            Pitched {
                source_pitch: u64::MAX / 2,
                ..good
            },
            "source: ",
        );
        refused(
            Pitched {
                destination: u64::MAX - 100,
                ..good
            },
            "destination: ",
        );
        let one_row = Pitched {
            source_pitch: 0,
            height: 1,
            ..good
        };
        one_row.check().unwrap();
        Pitched {
            source_pitch: 1,
            width: 0,
            ..good
        }
        .check()
        .unwrap();
    }
}
