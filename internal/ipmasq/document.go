package ipmasq

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"bauta.dev/bauta/internal/policy"
)

// The keys of the file. Both models decode with encoding/json, which takes keys
// in any case; so do we, but in profile strict.
const (
	keyCIDRs      = "nonMasqueradeCIDRs"
	keyLinkLocal  = "masqLinkLocal"
	keyLinkLocal6 = "masqLinkLocalIPv6"
	keyResync     = "resyncInterval" // there is nothing to re-sync: changes are seen
	keyLimit      = "cidrLimit"
)

var keys = []string{keyCIDRs, keyLinkLocal, keyLinkLocal6, keyResync, keyLimit}

// document is the content of one file. state is Empty, Blank, or NoList for any
// content: what that amounts to shows only in the merged whole.
type document struct {
	path    string
	profile Profile
	state   State

	hasList           bool // the key is there, even if null
	rules             []policy.Rule
	masqLinkLocal     bool
	masqLinkLocalIPv6 bool
	limit             int // 0: not given
	warnings, ignored []string
}

func parseDocument(f Fragment, p Profile) (document, error) {
	d := document{path: f.Path, profile: p, state: NoList}
	if len(f.Data) == 0 {
		d.state = Empty
		return d, nil
	}
	if len(f.Data) > MaxFileSize {
		return d, fmt.Errorf("%d bytes, the limit is %d", len(f.Data), MaxFileSize)
	}
	if blank(f.Data) {
		d.state = Blank
		return d, nil
	}
	fields, err := decode(f.Data)
	if err != nil {
		return d, err
	}
	if fields == nil {
		d.state = Blank
		return d, nil
	}
	if bytes.Contains(f.Data, []byte("\n---")) && manyDocuments.Match(f.Data) {
		const text = "more than one YAML document, only the first is read"
		if p == Strict {
			return d, errors.New(text)
		}
		d.warnings = append(d.warnings, text)
	}
	return d, d.setAll(fields)
}

// blank tells whether data has only blanks and comments. Tabs count as blanks,
// which YAML would refuse.
func blank(data []byte) bool {
	for line := range bytes.Lines(bytes.TrimPrefix(data, []byte("\uFEFF"))) {
		if text := bytes.TrimSpace(line); len(text) > 0 && text[0] != '#' {
			return false
		}
	}
	return true
}

// manyDocuments finds a line --- between two lines of content.
var manyDocuments = regexp.MustCompile(`(?ms)^[^#\s%-].*^---(?:\s.*)?$.*^[^#\s.-]`)

// decode returns the keys of the file with their values; nil means that the file
// says nothing. JSON is read as the YAML that it is.
func decode(data []byte) (map[string]any, error) {
	data, err := yaml.YAMLToJSONStrict(bytes.TrimPrefix(data, []byte("\uFEFF")))
	if err != nil {
		return nil, errors.New(strings.Join(strings.Fields(err.Error()), " ")) // of several lines
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	var root any
	if err := dec.Decode(&root); err != nil {
		return nil, err
	}
	switch root := root.(type) {
	case nil:
		return nil, nil
	case map[string]any:
		return root, nil
	}
	return nil, fmt.Errorf("%s, expected the key %s with a list", describe(root), keyCIDRs)
}

func (d *document) setAll(fields map[string]any) error {
	seen := make(map[string]string)
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		i := slices.IndexFunc(keys, func(k string) bool { return strings.EqualFold(k, name) })
		if i < 0 || d.profile == Strict && keys[i] != name {
			if d.profile == Strict {
				return fmt.Errorf("%s: unknown key (known are %s)", name, strings.Join(keys, ", "))
			}
			d.ignored = append(d.ignored, name)
			continue
		}
		if other, ok := seen[keys[i]]; ok {
			return fmt.Errorf("%s and %s: one key twice", other, name)
		}
		seen[keys[i]] = name
		if err := d.set(keys[i], fields[name]); err != nil {
			return fmt.Errorf("%s%w", name, err)
		}
	}
	return nil
}

// set stores one value. Its errors begin with what follows the key.
func (d *document) set(key string, v any) (err error) {
	switch key {
	case keyCIDRs:
		d.hasList = true
		return d.setList(v)
	case keyLinkLocal:
		d.masqLinkLocal, err = boolean(v)
	case keyLinkLocal6:
		d.masqLinkLocalIPv6, err = boolean(v)
	case keyResync:
		d.ignored = append(d.ignored, key)
		if d.profile == Upstream && v != nil {
			err = duration(v)
		}
	case keyLimit:
		if d.profile != Upstream {
			d.ignored = append(d.ignored, key)
			return nil
		}
		d.limit, err = limit(v)
	}
	return err
}

// boolean takes null for unset, as encoding/json does.
func boolean(v any) (bool, error) {
	switch v := v.(type) {
	case nil:
		return false, nil
	case bool:
		return v, nil
	}
	return false, fmt.Errorf(": %s, expected true or false", describe(v))
}

func duration(v any) error {
	text, ok := v.(string)
	if !ok {
		return fmt.Errorf(": %s, expected a duration such as 60s", describe(v))
	}
	if _, err := time.ParseDuration(text); err != nil {
		return fmt.Errorf(": %q: not a duration such as 60s", text)
	}
	return nil
}

func limit(v any) (int, error) {
	if v == nil {
		return 0, nil
	}
	if n, ok := v.(json.Number); ok {
		if n, err := n.Int64(); err == nil && n > 0 {
			return int(n), nil
		}
	}
	return 0, fmt.Errorf(": %s, expected a whole number above 0", describe(v))
}

// describe is a value of the wrong type, for messages.
func describe(v any) string {
	switch v := v.(type) {
	case nil:
		return "null"
	case string:
		return fmt.Sprintf("%q: a string", v)
	case bool:
		return fmt.Sprintf("%t: a boolean", v)
	case json.Number:
		return v.String() + ": a number"
	case []any:
		return "a list"
	}
	return "a mapping"
}
