package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/config"
	"bauta.dev/bauta/internal/ipmasq"
)

// fileKind is what config validate takes a file for.
type fileKind string

const (
	kindAgent     fileKind = "agent configuration"
	kindAgentDir  fileKind = "agent configuration directory"
	kindIPMasq    fileKind = "ip-masq-agent file"
	kindEffective fileKind = "effective configuration"
)

// ipMasqKeys are the keys of an ip-masq-agent file; case does not matter there.
var ipMasqKeys = []string{"nonmasqueradecidrs", "masqlinklocal", "masqlinklocalipv6", "resyncinterval", "cidrlimit"}

// detect tells what the file or directory at path is, by its keys.
func detect(path string) (fileKind, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", advice.Bare(err)
	}
	if info.IsDir() {
		return detectDir(path)
	}
	if !info.Mode().IsRegular() {
		return "", errors.New("neither a file nor a directory")
	}
	if info.Size() > ipmasq.MaxFileSize {
		return "", fmt.Errorf("%d bytes, the limit is %d", info.Size(), ipmasq.MaxFileSize)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return "", advice.Bare(err)
	}
	keys := topKeys(data)
	if slices.Contains(keys, "apiVersion") && slices.Contains(keys, "kind") {
		return "", advice.New(errors.New("a Kubernetes object, not a configuration file"), "give the file that its data holds")
	}
	return byKeys(keys, filepath.Base(path)), nil
}

// detectDir takes a directory with an option's name in it for that of
// --config-dir, any other for fragments of ip-masq-agent. One with a file for
// --config in it, such as /etc/bauta, is neither: as a list that file would mean
// that everything is masqueraded.
func detectDir(path string) (fileKind, error) {
	entries, err := os.ReadDir(path)
	if err != nil {
		return "", advice.Bare(err)
	}
	for _, e := range entries {
		if isOption(e.Name()) {
			return kindAgentDir, nil
		}
	}
	for _, e := range entries {
		file := filepath.Join(path, e.Name())
		info, err := e.Info()
		if err != nil || !info.Mode().IsRegular() || info.Size() > ipmasq.MaxFileSize {
			continue
		}
		if data, err := os.ReadFile(file); err == nil && slices.ContainsFunc(topKeys(data), isOption) {
			return "", advice.New(fmt.Errorf("%s in it is an agent configuration: not a directory of options, nor of ip-masq-agent files", e.Name()), "bauta config validate "+file)
		}
	}
	return kindIPMasq, nil
}

func byKeys(keys []string, name string) fileKind {
	switch {
	case slices.ContainsFunc(keys, isOption):
		return kindAgent
	case slices.ContainsFunc(keys, func(k string) bool { return slices.Contains(ipMasqKeys, strings.ToLower(k)) }):
		return kindIPMasq
	}
	// Nothing known: a slip in the only key. Ours have dashes, theirs capitals.
	camel := slices.ContainsFunc(keys, func(k string) bool { return strings.ToLower(k) != k && !strings.Contains(k, "-") })
	if camel || len(keys) == 0 && strings.Contains(name, "masq") {
		return kindIPMasq
	}
	return kindAgent
}

func isOption(name string) bool {
	return slices.ContainsFunc(config.Options(), func(o config.Option) bool { return slices.Contains(o.Names(), name) })
}

// keyLine finds keys where YAML can't be read as a whole.
var keyLine = regexp.MustCompile(`(?m)^[{\s]*["']?([A-Za-z][A-Za-z0-9-]*)["']?\s*:`)

func topKeys(data []byte) []string {
	var keys []string
	var root map[string]any
	if err := yaml.Unmarshal(data, &root); err == nil {
		for k := range root {
			keys = append(keys, k)
		}
		return keys
	}
	for _, m := range keyLine.FindAllSubmatch(data, -1) {
		keys = append(keys, string(m[1]))
	}
	return keys
}
