//! Compression of the log's rows. A compressed row has the size of what it holds in its column `size`; the others have
//! nothing there, as those of files from before there was compression.

use rusqlite::Connection;
use std::borrow::Cow;

/// Smaller data is stored as it is.
const BYTES_MIN: usize = 256;
/// LZ4 cannot expand data by more than this.
const EXPANSION_MAX: usize = 255;

/// What to store for `data`: the bytes, and the size if they are compressed.
pub fn pack(data: &[u8], compress: bool) -> (Cow<'_, [u8]>, Option<usize>) {
    if compress && data.len() >= BYTES_MIN {
        let packed = lz4_flex::block::compress(data);
        if packed.len() < data.len() {
            return (packed.into(), Some(data.len()));
        }
    }
    (data.into(), None)
}

/// What was stored as `data` and `size`. The error says what is wrong with it.
pub fn unpack(data: &[u8], size: Option<usize>) -> Result<Cow<'_, [u8]>, String> {
    let Some(size) = size else { return Ok(data.into()) };
    if size > data.len().saturating_mul(EXPANSION_MAX) {
        return Err(format!("claims to hold {size} bytes in {}", data.len()));
    }
    match lz4_flex::block::decompress(data, size) {
        Ok(unpacked) if unpacked.len() == size => Ok(unpacked.into()),
        Ok(unpacked) => Err(format!("holds {} bytes and claims to hold {size}", unpacked.len())),
        Err(error) => Err(format!("cannot be decompressed: {error}")),
    }
}

/// Adds the column to the table of an older file.
pub fn add_column(connection: &Connection, table: &str) -> rusqlite::Result<()> {
    let known = "SELECT count(*) FROM pragma_table_info(?1) WHERE name = 'size'";
    if connection.query_row(known, [table], |row| row.get::<_, u32>(0))? == 0 {
        connection.execute_batch(&format!("ALTER TABLE {table} ADD COLUMN size INTEGER"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_is_unpacked() {
        let repeated = "the same again, ".repeat(100).into_bytes();
        let (packed, size) = pack(&repeated, true);
        assert_eq!(size, Some(repeated.len()));
        assert!(packed.len() < repeated.len() / 10, "{} bytes", packed.len());
        assert_eq!(unpack(&packed, size).unwrap(), repeated);
        assert_eq!(pack(&repeated, false), (Cow::from(&repeated), None));

        // What does not become smaller is stored as it is.
        let noise: Vec<u8> = (0..1000_u32)
            .flat_map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes())
            .collect();
        for data in [&noise[..], b"short", b""] {
            let (stored, size) = pack(data, true);
            assert!(stored.len() <= data.len());
            assert_eq!(unpack(&stored, size).unwrap(), data);
        }
    }

    #[test]
    fn wrong_sizes_and_damaged_data_are_refused() {
        let data = b"abc".repeat(1000);
        let (packed, size) = pack(&data, true);
        for wrong in [0, 1, 2999, 3001, 100_000, usize::MAX] {
            assert!(unpack(&packed, Some(wrong)).is_err(), "{wrong}");
        }
        assert!(unpack(&packed[..packed.len() - 1], size).is_err());
        assert!(unpack(b"", Some(1)).is_err());
    }
}
