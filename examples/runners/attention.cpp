// A runner of kvconform's vectors in C++17 without libraries: an attention layer with a contiguous KV cache.
//
//   g++ -std=c++17 -O2 attention.cpp -o attention
//   kvconform vectors write vectors
//   ./attention vectors answers [--fault top-left]
//   kvconform vectors judge vectors answers
//
// It answers the vectors of the attention profile in float32. docs/interpreting.md says what a runner must do.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <limits>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace fs = std::filesystem;

// --- JSON: objects keep the order of their keys ---
struct Json {
    enum Kind { Null, Bool, Number, String, Array, Object } kind = Null;
    bool truth = false;
    double number = 0;
    std::string text;
    std::vector<Json> items;
    std::vector<std::pair<std::string, Json>> fields;

    const Json* find(const std::string& name) const {
        for (const auto& [key, value] : fields) if (key == name) return &value;
        return nullptr;
    }
    const Json& at(const std::string& name) const {
        if (const Json* found = find(name)) return *found;
        throw std::runtime_error("no field '" + name + "' in a JSON object");
    }
    double number_or(const std::string& name, double other) const {
        const Json* found = find(name);
        return found && found->kind == Number ? found->number : other;
    }
    std::vector<int> integers() const {
        std::vector<int> found;
        for (const Json& item : items) found.push_back(static_cast<int>(item.number));
        return found;
    }
};

class Parser {
  public:
    explicit Parser(const std::string& source) : text(source) {}
    Json parse() {
        skip();
        Json found;
        switch (peek()) {
            case '{': return object();
            case '[': return array();
            case '"': found.kind = Json::String; found.text = string(); return found;
            case 't': word("true"); found.kind = Json::Bool; found.truth = true; return found;
            case 'f': word("false"); found.kind = Json::Bool; return found;
            case 'n': word("null"); return found;
        }
        char* end = nullptr;
        found.kind = Json::Number;
        found.number = std::strtod(text.c_str() + place, &end);
        if (end == text.c_str() + place) throw std::runtime_error("malformed JSON");
        place = static_cast<size_t>(end - text.c_str());
        return found;
    }

  private:
    const std::string& text;
    size_t place = 0;

    char peek() const { return place < text.size() ? text[place] : '\0'; }
    void skip() { while (std::isspace(static_cast<unsigned char>(peek()))) ++place; }
    void expect(char one) {
        skip();
        if (peek() != one) throw std::runtime_error(std::string("malformed JSON: want ") + one);
        ++place;
    }
    bool next(char end) {  // after an entry: whether another one follows
        skip();
        if (peek() != ',') return expect(end), false;
        return ++place, true;
    }
    void word(const char* known) {
        if (text.compare(place, std::strlen(known), known) != 0) throw std::runtime_error("malformed JSON");
        place += std::strlen(known);
    }
    Json object() {
        Json found;
        found.kind = Json::Object;
        expect('{');
        skip();
        if (peek() == '}') { ++place; return found; }
        do {
            skip();
            std::string key = string();
            expect(':');
            found.fields.emplace_back(key, parse());
        } while (next('}'));
        return found;
    }
    Json array() {
        Json found;
        found.kind = Json::Array;
        expect('[');
        skip();
        if (peek() == ']') { ++place; return found; }
        do found.items.push_back(parse());
        while (next(']'));
        return found;
    }
    std::string string() {  // what is escaped as \u is only in texts, which this program does not read
        expect('"');
        std::string found;
        while (peek() != '"') {
            if (place >= text.size()) throw std::runtime_error("malformed JSON: a string does not end");
            if (peek() == '\\') ++place;
            found += text[place++];
        }
        ++place;
        return found;
    }
};

std::string contents(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error("cannot read " + path.string());
    std::ostringstream all;
    all << file.rdbuf();
    return all.str();
}

// --- safetensors: a length, a JSON header, and the bytes of the tensors (on little-endian machines) ---
struct Tensor {
    std::string dtype;
    std::vector<int> shape;
    std::string bytes;

    std::vector<float> floats() const {
        std::vector<float> found(bytes.size() / sizeof(float));
        std::memcpy(found.data(), bytes.data(), bytes.size());
        return found;
    }
};
using Tensors = std::map<std::string, Tensor>;

Tensors read_tensors(const fs::path& path) {
    const std::string data = contents(path);
    uint64_t length = 0;
    std::memcpy(&length, data.data(), sizeof length);
    const std::string head = data.substr(sizeof length, length);
    const Json header = Parser(head).parse();
    Tensors found;
    for (const auto& [name, entry] : header.fields) {
        if (name == "__metadata__") continue;
        const auto& ends = entry.at("data_offsets").items;
        const auto begin = static_cast<size_t>(ends[0].number), end = static_cast<size_t>(ends[1].number);
        found[name] = {entry.at("dtype").text, entry.at("shape").integers(),
                       data.substr(sizeof length + length + begin, end - begin)};
    }
    return found;
}

void write_tensors(const fs::path& path, const Tensors& tensors) {
    std::ostringstream header;
    std::string body;
    for (const auto& [name, tensor] : tensors) {
        header << (body.empty() && header.str().empty() ? "{" : ",") << '"' << name << "\":{\"dtype\":\"" << tensor.dtype
               << "\",\"shape\":[";
        for (size_t i = 0; i < tensor.shape.size(); ++i) header << (i ? "," : "") << tensor.shape[i];
        header << "],\"data_offsets\":[" << body.size() << ',' << body.size() + tensor.bytes.size() << "]}";
        body += tensor.bytes;
    }
    std::string head = tensors.empty() ? "{}" : header.str() + "}";
    head.append((8 - head.size() % 8) % 8, ' ');
    const uint64_t length = head.size();
    fs::create_directories(path.parent_path());
    std::ofstream file(path, std::ios::binary);
    file.write(reinterpret_cast<const char*>(&length), sizeof length);
    file << head << body;
    if (!file) throw std::runtime_error("cannot write " + path.string());
}

// --- the attention layer and its cache ---
struct Refused : std::runtime_error { using std::runtime_error::runtime_error; };

struct Layer {
    int heads, kv_heads, head_dim, capacity, window;  // window: 0 is none
    double scale, softcap, sink;                      // softcap 0 and sink NaN are none
    bool alibi, top_left;                             // top_left: the planted fault

    Layer(const Json& config, bool faulty)
        : heads(int(config.at("heads").number)), kv_heads(int(config.at("kv_heads").number)),
          head_dim(int(config.at("head_dim").number)), capacity(int(config.at("capacity").number)),
          window(int(config.number_or("window", 0))), scale(config.number_or("scale", 1 / std::sqrt(head_dim))),
          softcap(config.number_or("softcap", 0)), sink(config.number_or("sink", NAN)),
          alibi(config.at("positions").text == "alibi"), top_left(faulty) {}
};

struct Row {  // (s, g, d) each
    std::vector<float> keys, values;
    int length = 0;
};
using Sequence = std::vector<Row>;
struct Append {
    std::vector<int> counts;
    bool left = false;  // columns without a token come first
    const Tensor *query = nullptr, *key = nullptr, *value = nullptr, *mask = nullptr;
};

void check(const Layer& layer, const Sequence& rows, const Append& step) {
    const int b = int(rows.size());
    const int t = step.counts.empty() ? 0 : *std::max_element(step.counts.begin(), step.counts.end());
    if (step.counts.size() != rows.size()) throw Refused("another number of rows");
    const std::vector<int> q{b, layer.heads, t, layer.head_dim}, kv{b, layer.kv_heads, t, layer.head_dim};
    if (step.query->shape != q || step.key->shape != kv || step.value->shape != kv) throw Refused("malformed shapes");
    for (const Tensor* x : {step.query, step.key, step.value}) if (x->dtype != "F32") throw Refused("malformed dtypes");
    for (int r = 0; r < b; ++r)
        if (rows[r].length + step.counts[r] > layer.capacity) throw Refused("beyond the capacity");
}

// Appends to the rows, and returns the outputs (b, h, t, d); columns without a token give zeros.
Tensor attend(const Layer& layer, Sequence& rows, const Append& step) {
    check(layer, rows, step);
    const int h = layer.heads, g = layer.kv_heads, d = layer.head_dim, t = step.query->shape[2];
    const auto query = step.query->floats(), key = step.key->floats(), value = step.value->floats();
    std::vector<float> output(query.size(), 0.0f);
    std::vector<float> scores;
    for (size_t r = 0; r < rows.size(); ++r) {
        Row& row = rows[r];
        const int past = row.length, count = step.counts[r], first = step.left ? t - count : 0;
        for (int i = 0; i < count; ++i)
            for (int head = 0; head < g; ++head) {
                const size_t from = ((r * g + head) * t + first + i) * d;
                row.keys.insert(row.keys.end(), key.begin() + from, key.begin() + from + d);
                row.values.insert(row.values.end(), value.begin() + from, value.begin() + from + d);
            }
        row.length += count;
        for (int head = 0; head < h; ++head)
            for (int i = 0; i < count; ++i) {
                const int at = past + i, last = layer.top_left ? i : at;
                const int begin = layer.window ? std::max(0, at - layer.window + 1) : 0;
                const size_t place = ((r * h + head) * t + first + i) * d;
                const size_t group = size_t(head / (h / g)) * d;
                float top = std::isnan(layer.sink) ? -std::numeric_limits<float>::infinity()
                                                   : float(layer.sink * (head + 1) / h);
                const float sink = top;
                scores.assign(size_t(last + 1), -std::numeric_limits<float>::infinity());
                for (int j = begin; j <= last; ++j) {
                    if (step.mask && !step.mask->bytes[r * step.mask->shape[1] + j]) continue;
                    float score = 0;
                    for (int k = 0; k < d; ++k) score += query[place + k] * row.keys[size_t(j) * g * d + group + k];
                    score *= float(layer.scale);
                    if (layer.softcap) score = float(layer.softcap) * std::tanh(score / float(layer.softcap));
                    if (layer.alibi) score += float(std::exp2(-8.0 * (head + 1) / h)) * float(j - at);
                    scores[size_t(j)] = score;
                    top = std::max(top, score);
                }
                if (std::isinf(top) && top < 0) continue;  // it sees nothing
                float total = std::isnan(layer.sink) ? 0 : std::exp(sink - top);
                for (int j = begin; j <= last; ++j) {
                    if (std::isinf(scores[size_t(j)]) && scores[size_t(j)] < 0) continue;  // values may be NaN
                    const float weight = std::exp(scores[size_t(j)] - top);
                    total += weight;
                    for (int k = 0; k < d; ++k) output[place + k] += weight * row.values[size_t(j) * g * d + group + k];
                }
                for (int k = 0; k < d; ++k) output[place + k] /= total;
            }
    }
    Tensor made{"F32", step.query->shape, std::string(output.size() * sizeof(float), '\0')};
    std::memcpy(made.bytes.data(), output.data(), made.bytes.size());
    return made;
}

// --- programs ---
class Program {
  public:
    Program(const Layer& of, const Tensors& given) : layer(of), tensors(given) {}

    // The answer to a step; steps that give nothing return false.
    bool answer(const Json& step, Tensor& output) {
        const Json& call = step.at("call");
        if (call.at("op").text != "reject") return run(call, step.at("tensors"), output);
        Tensor ignored;
        char refused = 0;
        const auto before = open;
        try {
            run(call.at("step"), step.at("tensors"), ignored);
        } catch (const Refused&) {
            refused = 1;
            open = before;  // a refused call opens no sequence
        }
        output = {"U8", {1}, std::string(1, refused)};
        return true;
    }

  private:
    const Layer& layer;
    const Tensors& tensors;
    std::map<std::string, Sequence> open;

    bool run(const Json& call, const Json& roles, Tensor& output) {
        const std::string &op = call.at("op").text, &name = call.at("seq").text;
        if (op == "append" || op == "uncached_forward") {
            Append step;
            step.counts = call.at("counts").integers();
            if (const Json* pad = call.find("pad")) step.left = pad->items.at(0).text == "left";
            step.query = role(roles, "query"), step.key = role(roles, "key"), step.value = role(roles, "value");
            step.mask = role(roles, "mask");
            Sequence alone(step.counts.size());
            Sequence& rows = op == "append" ? open.try_emplace(name, alone).first->second : alone;
            output = attend(layer, rows, step);
            return true;
        }
        Sequence& rows = open.at(name);
        if (op == "truncate") {
            const Json& length = call.at("length");
            for (size_t r = 0; r < rows.size(); ++r) {
                const Json& kept = length.kind == Json::Array ? length.items.at(r) : length;
                if (kept.number < 0 || kept.number > rows[r].length) throw Refused("there are no such tokens");
            }
            for (size_t r = 0; r < rows.size(); ++r)
                cut(rows[r], int((length.kind == Json::Array ? length.items.at(r) : length).number));
        } else if (op == "fork") {
            open[call.at("into").text] = rows;
        } else if (op == "reorder") {
            Sequence moved;
            for (int from : call.at("rows").integers()) {
                if (from < 0 || from >= int(rows.size())) throw Refused("there is no such row");
                moved.push_back(rows[size_t(from)]);
            }
            rows = moved;
        } else if (op == "reset") {
            for (Row& row : rows) row = Row();
        } else if (op == "close") {
            open.erase(name);
        } else if (op != "poison") {  // this cache has no slot without a token
            throw std::runtime_error("unknown operation " + op);
        }
        return false;
    }
    void cut(Row& row, int length) {
        row.length = length;
        row.keys.resize(size_t(length) * layer.kv_heads * layer.head_dim);
        row.values.resize(row.keys.size());
    }
    const Tensor* role(const Json& roles, const std::string& name) const {
        const Json* found = roles.find(name);
        return found ? &tensors.at(found->text) : nullptr;
    }
};

int main(int argc, char** argv) try {
    const bool faulty = argc == 5 && std::string(argv[3]) == "--fault" && std::string(argv[4]) == "top-left";
    if (argc != 3 && !faulty) throw std::runtime_error("usage: attention VECTORS ANSWERS [--fault top-left]");
    const fs::path folder = argv[1], out = argv[2];
    const std::string text = contents(folder / "manifest.json");
    const Json manifest = Parser(text).parse();
    std::ostringstream lacking;
    std::map<std::string, Layer> layers;
    bool decoders = false;
    for (const auto& [name, entry] : manifest.at("configs").fields) {
        const Json& config = entry.at("config");
        if (config.at("profile").text != "attention") decoders = true;
        else if (config.at("dtype").text == "float32") layers.emplace(name, Layer(config, faulty));
        else lacking << (lacking.str().empty() ? "" : ",") << '"' << name << "\":\"computes in float32\"";
    }
    if (decoders) lacking << (lacking.str().empty() ? "" : ",") << "\"decoder\":\"is an attention layer\"";
    int answered = 0;
    for (const Json& vector : manifest.at("vectors").items) {
        const auto layer = layers.find(vector.at("config").text);
        if (layer == layers.end()) continue;
        const std::string file = vector.at("name").text + ".safetensors";
        const Tensors given = read_tensors(folder / file);
        Tensors answers;
        for (size_t p = 0; p < vector.at("programs").items.size(); ++p) {
            Program program(layer->second, given);
            const auto& steps = vector.at("programs").items[p].items;
            for (size_t i = 0; i < steps.size(); ++i) {
                Tensor output;
                if (program.answer(steps[i], output)) answers[std::to_string(p) + "." + std::to_string(i)] = output;
            }
        }
        write_tensors(out / file, answers);
        ++answered;
    }
    std::ofstream(out / "answers.json") << "{\"schema\":\"kvconform-answers/1\",\"runner\":\"attention-cpp\",\"digest\":\""
                                        << manifest.at("digest").text << "\",\"unsupported\":{" << lacking.str() << "}}\n";
    std::cout << answered << " vectors answered\n";
} catch (const std::exception& error) {
    std::cerr << "attention: " << error.what() << '\n';
    return 2;
}
