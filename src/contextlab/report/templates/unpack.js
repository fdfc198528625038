  // What is packed (contextlab.report.packing): five characters are four bytes.
  const bytesOf = (text) => {
    const bytes = new DataView(new ArrayBuffer(text.length / 5 * 4)), value = new Uint8Array(128);
    [..."0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;,=>?@^_`{|}~"].forEach((c, i) => value[c.charCodeAt(0)] = i);
    for (let i = 0, at = 0; i < text.length; i += 5, at += 4) {
      let word = 0;
      for (let j = 0; j < 5; j++) word = word * 85 + value[text.charCodeAt(i + j)];
      bytes.setUint32(at, word);
    }
    return new Uint8Array(bytes.buffer);
  };
  // LZMA as its author's specification has it, without a header, with 4 bits of the last byte and none of the place
  // as a literal's context. `size` bytes come out. p: the probabilities that a bit is 0, of 2048; what begins where:
  const MATCH = 0, REP = 12, LATER = 24, LATER2 = 36, LATER3 = 48, LONG = 60, SLOT = 72, NEAR = 328, ALIGN = 456, NEW = 472, AGAIN = 746, LITERAL = 1020;
  const unlzma = (packed, size) => {
    const out = new Uint8Array(size), p = new Uint16Array(LITERAL + (0x300 << 4)).fill(1024);
    const coder = Uint32Array.of(0xffffffff, new DataView(packed.buffer).getUint32(1));  // range, code
    let at = 5, n = 0, state = 0, distance = 0, second = 0, third = 0, fourth = 0;
    const more = () => { if (coder[0] < 0x1000000) { coder[0] <<= 8; coder[1] = coder[1] << 8 | packed[at++]; } };
    const bit = (i) => {
      const bound = (coder[0] >>> 11) * p[i], one = coder[1] >= bound;
      if (one) { coder[0] -= bound; coder[1] -= bound; p[i] -= p[i] >> 5; } else { coder[0] = bound; p[i] += 2048 - p[i] >> 5; }
      more();
      return +one;
    };
    const tree = (base, bits) => { let m = 1; for (let i = 0; i < bits; i++) m = m << 1 | bit(base + m); return m - (1 << bits); };
    const reversed = (base, bits) => { let m = 1, found = 0; for (let i = 0; i < bits; i++) { const b = bit(base + m); m = m << 1 | b; found |= b << i; } return found; };
    const even = (bits) => { let found = 0; while (bits--) { coder[0] >>>= 1; const one = coder[1] >= coder[0]; if (one) coder[1] -= coder[0]; found = found << 1 | one; more(); } return found; };
    const length = (base) => 2 + (!bit(base) ? tree(base + 2, 3) : !bit(base + 1) ? 8 + tree(base + 10, 3) : 16 + tree(base + 18, 8));
    const far = (slot) => {
      if (slot < 4) return slot;
      const bits = (slot >> 1) - 1, base = (2 | slot & 1) << bits;
      return slot < 14 ? base + reversed(NEAR + base - slot, bits) : base + (even(bits - 4) << 4) + reversed(ALIGN, 4);
    };
    while (n < size) {
      if (!bit(MATCH + state)) {
        const base = LITERAL + 0x300 * ((n ? out[n - 1] : 0) >> 4);
        let m = 1;
        if (state > 6) {  // after a match the byte that would have gone on with it tells something
          for (let like = out[n - distance - 1], same = true; same && m < 256; like <<= 1) {
            const old = like >> 7 & 1, b = bit(base + (1 + old << 8) + m);
            m = m << 1 | b; same = b === old;
          }
        }
        while (m < 256) m = m << 1 | bit(base + m);
        out[n++] = m;
        state = state < 4 ? 0 : state < 10 ? state - 3 : state - 6;
        continue;
      }
      let count = 1;
      if (!bit(REP + state)) {
        fourth = third; third = second; second = distance;
        count = length(NEW);
        distance = far(tree(SLOT + (Math.min(count - 2, 3) << 6), 6));
        state = state < 7 ? 7 : 10;
      } else {
        const older = bit(LATER + state);
        if (older || bit(LONG + state)) {
          if (older) {
            let found = second;
            if (bit(LATER2 + state)) {
              if (bit(LATER3 + state)) { found = fourth; fourth = third; } else found = third;
              third = second;
            }
            second = distance; distance = found;
          }
          count = length(AGAIN);
          state = state < 7 ? 8 : 11;
        } else state = state < 7 ? 9 : 11;  // one byte from where the last match was
      }
      for (; count && n < size; count--, n++) out[n] = out[n - distance - 1];
    }
    return out;
  };
  // form: how the bytes are packed. packed, bytes: how many they are, and how many the text has.
  const unpackText = async (text, { form, packed, bytes }) => {
    const found = bytesOf(text);
    if (form === "lzma") return new TextDecoder().decode(unlzma(found, +bytes));
    if (typeof DecompressionStream !== "function") throw new Error("This browser cannot unpack the figures (Chrome 80, Firefox 113 and Safari 16.4 can, and later ones); the tables have all numbers.");
    return new Response(new Blob([found.subarray(0, +packed)]).stream().pipeThrough(new DecompressionStream("deflate"))).text();
  };
