package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	"bauta.dev/bauta/internal/advice"
)

// maxSize bounds what is read of one file: no option needs a megabyte.
const maxSize = 1 << 20

// tagged finds an unquoted value that begins with !, which YAML takes for a tag
// and drops: `devices: !eth1` would mean no devices at all.
var tagged = regexp.MustCompile(`(?m)^\s*(?:- +|[a-z0-9-]+: +)(![^\s]*)`)

func fromFile(path string) (layer, error) {
	l := make(layer)
	if path == "" {
		return l, nil
	}
	data, err := readFile(path)
	if err != nil {
		return nil, &Error{Msg: "config file " + path, Err: advice.Bare(err), Hints: []string{"give a YAML file to --config that is there and may be read"}}
	}
	if m := tagged.FindSubmatch(data); m != nil {
		return nil, &Error{Msg: fmt.Sprintf("file %s: %s: YAML takes an unquoted ! for a tag", path, m[1]),
			Hints: []string{fmt.Sprintf("write %q, with quotes", m[1])}}
	}
	if n := documents(data); n > 1 {
		return nil, &Error{Msg: fmt.Sprintf("file %s: %d YAML documents, expected one", path, n),
			Hints: []string{"remove the lines ---, or give the documents as files of their own"}}
	}
	values, err := decode(data)
	if err != nil {
		return nil, &Error{Msg: "file " + path, Err: err, Hints: []string{"write one OPTION: VALUE a line, with option names as keys"}}
	}
	for _, name := range slices.Sorted(maps.Keys(values)) {
		s, ok := newSetting(name, fmt.Sprintf("file %s key %s", path, name))
		if !ok {
			return nil, unknown(fmt.Sprintf("file %s key %s", path, name), name)
		}
		if l[name], err = s.fromYAML(values[name]); err != nil {
			return nil, err
		}
	}
	return l, nil
}

func decode(data []byte) (map[string]any, error) {
	data, err := yaml.YAMLToJSONStrict(data)
	if err != nil {
		return nil, errors.New(oneLine(err))
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber() // without it 1048576 comes back as 1.048576e+06
	var root any
	if err := d.Decode(&root); err != nil {
		return nil, err
	}
	switch root := root.(type) {
	case nil:
		return nil, nil
	case map[string]any:
		return root, nil
	}
	return nil, errors.New("not a mapping of option names to values")
}

// documents counts YAML documents with content: a line --- begins another one.
func documents(data []byte) int {
	n, content := 0, false
	for line := range bytes.Lines(data) {
		line = bytes.TrimRight(line, " \t\r\n")
		switch text := bytes.TrimSpace(line); {
		case bytes.Equal(line, []byte("---")), bytes.HasPrefix(line, []byte("--- ")):
			content = len(line) > 3
			if content {
				n++
			}
		case len(text) == 0, text[0] == '#', bytes.Equal(line, []byte("...")), text[0] == '%':
		case !content:
			content = true
			n++
		}
	}
	return n
}

// fromDir reads a directory with a file an option, as a mounted ConfigMap is.
func (c *Config) fromDir(dir string) (layer, error) {
	l := make(layer)
	if dir == "" {
		return l, nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, &Error{Msg: "config directory " + dir, Err: advice.Bare(err), Hints: []string{"give an existing directory with a file per option to --config-dir"}}
	}
	for _, e := range entries {
		name := e.Name()
		if strings.HasPrefix(name, ".") {
			continue // the kubelet's ..data and ..TIMESTAMP
		}
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && info.IsDir() {
			continue
		}
		s, ok := newSetting(name, "directory file "+path)
		if !ok || foreign(name) {
			c.Ignored = append(c.Ignored, name)
			continue
		}
		data, err := readFile(path)
		if err != nil {
			return nil, &Error{Msg: "directory file " + path, Err: advice.Bare(err), Hints: []string{"make it a readable file with the value of " + name}}
		}
		s.dir = true
		l[name] = s.withText(string(data))
	}
	return l, nil
}

func foreign(name string) bool {
	i := slices.IndexFunc(options, func(o Option) bool { return slices.Contains(o.Names(), name) })
	return options[i].Foreign
}

func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("not a regular file") // reading a pipe would block
	}
	if info.Size() > maxSize {
		return nil, fmt.Errorf("%d bytes, the limit is %d", info.Size(), maxSize)
	}
	data, err := os.ReadFile(path)
	return bytes.TrimPrefix(data, []byte("\uFEFF")), err
}

func oneLine(err error) string {
	return strings.Join(strings.Fields(err.Error()), " ")
}
