//! Column chunks of what stays the same for many rows: the dictionary's page, and one page of runs.
//!
//! parquet's own writer finds out by hashing that a row says what the row before it said, which for silver's ten columns
//! of text took longer than everything else in its files; numbers it takes one by one. Whoever lays them out knows it
//! already. What is written here is plain Parquet (Apache Parquet, "Encodings": PLAIN dictionary page, RLE_DICTIONARY
//! data page of version 1, and of the RLE/bit-packing hybrid the runs alone); columns with short runs are better left
//! to the library.

use std::{collections::HashMap, sync::Arc};

use arrow::{
    array::{Array, ArrayRef, AsArray, DictionaryArray, Int32Array, RunArray},
    compute::take,
    datatypes::{DataType, Int32Type, Int64Type, TimestampMicrosecondType},
};
use bytes::Bytes;
use parquet::{
    basic::{Compression, Encoding, EncodingMask, PageType, Type},
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

/// A column by runs: the key of each run's word.
pub(super) fn of_runs(column: &ArrayRef) -> Option<(&RunArray<Int32Type>, &DictionaryArray<Int32Type>)> {
    let runs = column.as_any().downcast_ref::<RunArray<Int32Type>>()?;
    Some((runs, runs.values().as_dictionary_opt()?))
}

/// How a column is laid out once it is [`unrolled`].
pub(super) fn by_rows(layout: &DataType) -> &DataType {
    match layout {
        DataType::RunEndEncoded(_, said) => match said.data_type() {
            DataType::Dictionary(_, number) if **number != DataType::Utf8 => number,
            text => text,
        },
        rows => rows,
    }
}

/// The same column by rows: text by dictionary, numbers as they are.
///
/// # Errors
/// None that the bytes in memory could cause.
pub(super) fn unrolled(column: &ArrayRef) -> Result<ArrayRef> {
    let Some((runs, words)) = of_runs(column) else { return Ok(Arc::clone(column)) };
    let mut keys: Vec<Option<i32>> = Vec::with_capacity(runs.len());
    for (at, end) in (runs.get_start_physical_index()..).zip(runs.run_ends().sliced_values()) {
        let key = words.is_valid(at).then(|| words.keys().value(at));
        keys.resize(usize::try_from(end).unwrap_or(0), key);
    }
    let keys = Int32Array::from(keys);
    match words.values().data_type() {
        DataType::Utf8 => Ok(Arc::new(DictionaryArray::try_new(keys, Arc::clone(words.values()))?)),
        _ => Ok(take(words.values(), &keys, None)?),
    }
}

/// A word as PLAIN has it, but for the length before text; `None` of what is neither text nor a whole number.
fn plain(words: &ArrayRef, key: usize) -> Option<Vec<u8>> {
    if let Some(text) = words.as_string_opt::<i32>() {
        return Some(text.value(key).into());
    }
    let number = match words.as_primitive_opt::<Int64Type>() {
        Some(numbers) => numbers.value(key),
        None => words.as_primitive_opt::<TimestampMicrosecondType>()?.value(key),
    };
    Some(number.to_le_bytes().into())
}

/// The words of a column in the order in which they come, and where they stand.
#[derive(Debug, Default)]
struct Runs {
    words: Vec<Vec<u8>>,
    /// Index of the word, or none for null, and how many rows say it.
    runs: Vec<(Option<u32>, u64)>,
    rows: usize,
}

impl Runs {
    /// `None` when a part is not by runs, or when these are short.
    fn of(parts: &[&ArrayRef]) -> Option<Runs> {
        let columns = parts.iter().map(|part| of_runs(part)).collect::<Option<Vec<_>>>()?;
        let rows: usize = columns.iter().map(|(runs, _)| runs.len()).sum();
        let many: usize = columns.iter().map(|(runs, _)| runs.run_ends().sliced_values().count()).sum();
        if many * LONG > rows {
            return None;
        }
        let mut all = Runs { rows, ..Runs::default() };
        let mut index = HashMap::<Vec<u8>, u32>::new();
        let (mut words, mut codes): (Option<&ArrayRef>, Vec<Option<u32>>) = (None, Vec::new());
        for (runs, said) in columns {
            if !words.is_some_and(|words| Arc::ptr_eq(words, said.values())) {
                (words, codes) = (Some(said.values()), vec![None; said.values().len()]);
            }
            let mut row = 0;
            for (at, end) in (runs.get_start_physical_index()..).zip(runs.run_ends().sliced_values()) {
                let key = said.key(at);
                if let Some(key) = key.filter(|key| codes[*key].is_none()) {
                    codes[key] = Some(all.code(&mut index, plain(said.values(), key)?));
                }
                let end = usize::try_from(end).ok()?;
                all.push(key.and_then(|key| codes[key]), end - row);
                row = end;
            }
        }
        (!all.words.is_empty()).then_some(all)
    }

    /// The number of a word.
    fn code(&mut self, index: &mut HashMap<Vec<u8>, u32>, word: Vec<u8>) -> u32 {
        let next = u32::try_from(self.words.len()).expect("fewer words than rows, which an i32 counts");
        *index.entry(word).or_insert_with_key(|word| {
            self.words.push(word.clone());
            next
        })
    }

    fn push(&mut self, code: Option<u32>, rows: usize) {
        match self.runs.last_mut() {
            Some((last, before)) if *last == code => *before += rows as u64,
            _ => self.runs.push((code, rows as u64)),
        }
    }

    fn nulls(&self) -> u64 {
        self.runs.iter().filter(|(code, _)| code.is_none()).map(|(_, rows)| rows).sum()
    }

    /// The bytes of each word, before text with their length.
    fn dictionary(&self, text: bool) -> Bytes {
        let mut page = Vec::new();
        for word in &self.words {
            if text {
                page.extend_from_slice(&u32::try_from(word.len()).unwrap_or(u32::MAX).to_le_bytes());
            }
            page.extend_from_slice(word);
        }
        page.into()
    }

    /// The least and the greatest word.
    fn limits(&self, text: bool) -> Statistics {
        let nulls = Some(self.nulls());
        if text {
            let [least, greatest] = [self.words.iter().min(), self.words.iter().max()]
                .map(|word| word.map(|word| ByteArray::from(word.clone())));
            return Statistics::byte_array(least, greatest, None, nulls, false);
        }
        let numbers = || self.words.iter().filter_map(|word| Some(i64::from_le_bytes(*word.first_chunk()?)));
        Statistics::int64(numbers().min(), numbers().max(), None, nulls, false)
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
    let text = column.physical_type() == Type::BYTE_ARRAY;
    let (dictionary, data) = (runs.dictionary(text), runs.data(column.max_def_level() > 0));
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
        metadata = metadata.set_statistics(runs.limits(text));
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
