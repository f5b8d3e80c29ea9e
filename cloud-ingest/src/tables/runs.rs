//! Column chunks of text that stays the same for many rows: the dictionary's page, and one page of runs.
//!
//! parquet's own writer finds out by hashing that a row says what the row before it said, which for silver's ten columns
//! of text took longer than everything else in its files. Whoever lays them out knows it already. What is written here is
//! plain Parquet (Apache Parquet, "Encodings": PLAIN dictionary page, RLE_DICTIONARY data page of version 1, and of the
//! RLE/bit-packing hybrid the runs alone); columns with short runs are better left to the library.

use std::{collections::HashMap, sync::Arc};

use arrow::{
    array::{Array, ArrayRef, AsArray, DictionaryArray, Int32Array, RunArray},
    datatypes::Int32Type,
};
use bytes::Bytes;
use parquet::{
    basic::{Compression, Encoding, EncodingMask, PageType},
    column::{
        page::{CompressedPage, Page, PageWriter},
        writer::ColumnCloseResult,
    },
    data_type::ByteArray,
    errors::Result,
    file::{
        metadata::{ColumnChunkMetaData, PageEncodingStats},
        page_index::offset_index::{OffsetIndexMetaData, PageLocation},
        statistics::Statistics,
        writer::{SerializedPageWriter, TrackedWrite},
    },
    schema::types::ColumnDescPtr,
};

/// With fewer rows to a run, packing bits takes less room.
const LONG: usize = 8;

/// Text by runs: the key of each run's word.
pub(super) fn of_runs(column: &ArrayRef) -> Option<(&RunArray<Int32Type>, &DictionaryArray<Int32Type>)> {
    let runs = column.as_any().downcast_ref::<RunArray<Int32Type>>()?;
    Some((runs, runs.values().as_dictionary_opt()?))
}

/// The same text by rows.
pub(super) fn unrolled(column: &ArrayRef) -> ArrayRef {
    let Some((runs, words)) = of_runs(column) else { return Arc::clone(column) };
    let mut keys: Vec<Option<i32>> = Vec::with_capacity(runs.len());
    for (at, end) in (runs.get_start_physical_index()..).zip(runs.run_ends().sliced_values()) {
        let key = words.is_valid(at).then(|| words.keys().value(at));
        keys.resize(usize::try_from(end).unwrap_or(0), key);
    }
    // The keys are those of a dictionary.
    let keys = Int32Array::from(keys);
    Arc::new(DictionaryArray::new(keys, Arc::clone(words.values())))
}

/// The words of a column in the order in which they come, and where they stand.
#[derive(Debug, Default)]
struct Runs {
    words: Vec<ByteArray>,
    /// Index of the word, or none for null, and how many rows say it.
    runs: Vec<(Option<u32>, u64)>,
    rows: usize,
}

impl Runs {
    /// `None` when a part is no text by runs, or when these are short.
    fn of(parts: &[&ArrayRef]) -> Option<Runs> {
        let mut all = Runs::default();
        let mut index = HashMap::<&str, u32>::new();
        for part in parts {
            let (runs, said) = of_runs(part)?;
            let words = said.values().as_string_opt::<i32>()?;
            let mut row = 0;
            for (at, end) in (runs.get_start_physical_index()..).zip(runs.run_ends().sliced_values()) {
                let code = said.key(at).map(|key| all.code(&mut index, words.value(key)));
                let end = usize::try_from(end).ok()?;
                all.push(code, end - row);
                row = end;
            }
            if all.runs.len() * LONG > all.rows {
                return None;
            }
        }
        (!all.words.is_empty()).then_some(all)
    }

    /// The number of a word.
    fn code<'a>(&mut self, index: &mut HashMap<&'a str, u32>, word: &'a str) -> u32 {
        let next = u32::try_from(self.words.len()).expect("fewer words than rows, which an i32 counts");
        let code = *index.entry(word).or_insert(next);
        if code == next {
            self.words.push(ByteArray::from(word));
        }
        code
    }

    fn push(&mut self, code: Option<u32>, rows: usize) {
        match self.runs.last_mut() {
            Some((last, before)) if *last == code => *before += rows as u64,
            _ => self.runs.push((code, rows as u64)),
        }
        self.rows += rows;
    }

    fn nulls(&self) -> u64 {
        self.runs.iter().filter(|(code, _)| code.is_none()).map(|(_, rows)| rows).sum()
    }

    /// Length and bytes of each word.
    fn dictionary(&self) -> Bytes {
        let mut page = Vec::new();
        for word in &self.words {
            page.extend_from_slice(&u32::try_from(word.len()).unwrap_or(u32::MAX).to_le_bytes());
            page.extend_from_slice(word.data());
        }
        page.into()
    }

    /// Which rows are null, where any may be, and the words of the others.
    fn data(&self, nullable: bool) -> Bytes {
        let mut page = Vec::new();
        if nullable {
            page.extend_from_slice(&[0; 4]);
            hybrid(&mut page, 1, self.runs.iter().map(|(code, rows)| (u32::from(code.is_some()), *rows)));
            let length = u32::try_from(page.len() - 4).unwrap_or(u32::MAX);
            page[..4].copy_from_slice(&length.to_le_bytes());
        }
        let last = u32::try_from(self.words.len() - 1).unwrap_or(u32::MAX);
        let width = u32::BITS - last.leading_zeros();
        page.push(width as u8);
        hybrid(&mut page, width, self.runs.iter().filter_map(|(code, rows)| Some(((*code)?, *rows))));
        page.into()
    }
}

/// Runs of values of so many bits: twice the length as a varint, then the value in whole bytes.
fn hybrid(page: &mut Vec<u8>, width: u32, runs: impl Iterator<Item = (u32, u64)>) {
    let mut runs = runs.peekable();
    while let Some((value, mut rows)) = runs.next() {
        while let Some((_, more)) = runs.next_if(|(next, _)| *next == value) {
            rows += more;
        }
        let mut header = rows << 1;
        while header >= 0x80 {
            page.push(header as u8 | 0x80);
            header >>= 7;
        }
        page.push(header as u8);
        page.extend_from_slice(&value.to_le_bytes()[..width.div_ceil(8) as usize]);
    }
}

/// The chunk of a column, for [`append_column`](parquet::file::writer::SerializedRowGroupWriter::append_column), with the
/// least and greatest word where `statistics` are wanted. `None` when the library had better write it.
///
/// # Errors
/// None that the bytes in memory could cause.
pub(super) fn chunk(
    column: &ColumnDescPtr,
    parts: &[&ArrayRef],
    statistics: bool,
) -> Result<Option<(Bytes, ColumnCloseResult)>> {
    let Some(runs) = Runs::of(parts) else { return Ok(None) };
    let (dictionary, data) = (runs.dictionary(), runs.data(column.max_def_level() > 0));
    let (rows, words) = (u32::try_from(runs.rows)?, u32::try_from(runs.words.len())?);
    let (dictionary_size, data_size) = (dictionary.len(), data.len());
    let mut bytes = TrackedWrite::new(Vec::with_capacity(dictionary_size + data_size + 64));
    let mut pages = SerializedPageWriter::new(&mut bytes);
    let dictionary = Page::DictionaryPage {
        buf: dictionary,
        num_values: words,
        encoding: Encoding::PLAIN,
        is_sorted: false,
    };
    let dictionary = pages.write_page(CompressedPage::new(dictionary, dictionary_size))?;
    let data = Page::DataPage {
        buf: data,
        num_values: rows,
        encoding: Encoding::RLE_DICTIONARY,
        def_level_encoding: Encoding::RLE,
        rep_level_encoding: Encoding::RLE,
        statistics: None,
    };
    let data = pages.write_page(CompressedPage::new(data, data_size))?;
    let count = |page_type, encoding| PageEncodingStats { page_type, encoding, count: 1 };
    let size = i64::try_from(dictionary.bytes_written + data.bytes_written)?;
    let encodings = [Encoding::PLAIN, Encoding::RLE, Encoding::RLE_DICTIONARY];
    let mut metadata = ColumnChunkMetaData::builder(column.clone())
        .set_compression(Compression::UNCOMPRESSED)
        .set_encodings_mask(EncodingMask::new_from_encodings(encodings.iter()))
        .set_page_encoding_stats(vec![
            count(PageType::DICTIONARY_PAGE, Encoding::PLAIN),
            count(PageType::DATA_PAGE, Encoding::RLE_DICTIONARY),
        ])
        .set_total_compressed_size(size)
        .set_total_uncompressed_size(size)
        .set_num_values(i64::from(rows))
        .set_dictionary_page_offset(Some(i64::try_from(dictionary.offset)?))
        .set_data_page_offset(i64::try_from(data.offset)?);
    if statistics {
        let least = runs.words.iter().min_by_key(|word| word.data()).cloned();
        let greatest = runs.words.iter().max_by_key(|word| word.data()).cloned();
        let limits = Statistics::byte_array(least, greatest, None, Some(runs.nulls()), false);
        metadata = metadata.set_statistics(limits);
    }
    let location = PageLocation {
        offset: i64::try_from(data.offset)?,
        compressed_page_size: i32::try_from(data.compressed_size)?,
        first_row_index: 0,
    };
    let close = ColumnCloseResult {
        bytes_written: dictionary.bytes_written + data.bytes_written,
        rows_written: u64::from(rows),
        metadata: metadata.build()?,
        bloom_filter: None,
        column_index: None,
        offset_index: Some(OffsetIndexMetaData {
            page_locations: vec![location],
            unencoded_byte_array_data_bytes: None,
        }),
    };
    Ok(Some((bytes.into_inner()?.into(), close)))
}
