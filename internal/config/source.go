package config

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// layer is one source: what it gives, by name or alias.
type layer map[string]setting

// read returns the sources, the highest first.
func (c *Config) read(src Sources) ([]layer, error) {
	flags, err := fromFlags(src.Flags)
	if err != nil {
		return nil, err
	}
	file, err := fromFile(src.File)
	if err != nil {
		return nil, err
	}
	dir, err := c.fromDir(src.Dir)
	if err != nil {
		return nil, err
	}
	return []layer{flags, c.fromEnviron(src.Environ), file, dir, nodeName(src.Environ)}, nil
}

// newSetting is a setting without value; ok is false for an unknown name.
func newSetting(name string, source string) (s setting, ok bool) {
	kind, ok := allNames()[name]
	s = setting{name: name, kind: kind, source: source}
	for _, o := range options {
		if o.Name == name {
			s.values = o.Values
		}
	}
	return s, ok
}

// withText gives s one text.
func (s setting) withText(text string) setting {
	text = strings.TrimSpace(text)
	s.items = []string{text}
	s.unset = text == "" || text == auto
	return s
}

func fromFlags(flags map[string]string) (layer, error) {
	l := make(layer)
	for _, name := range slices.Sorted(maps.Keys(flags)) {
		s, ok := newSetting(name, "flag --"+name)
		if !ok {
			return nil, unknown("flag --"+name, name)
		}
		s = s.withText(flags[name])
		if s.text() == "" && s.kind != List && s.kind != String {
			return nil, s.refuse("no value", "leave the flag out for the default")
		}
		l[name] = s
	}
	return l, nil
}

// fromEnviron skips empty variables: that is how a shell unsets one.
func (c *Config) fromEnviron(environ []string) layer {
	l := make(layer)
	byEnv := make(map[string]string)
	for name := range allNames() {
		byEnv[EnvName(name)] = name
	}
	for _, kv := range environ {
		key, value, _ := strings.Cut(kv, "=")
		name, ok := byEnv[key]
		switch {
		case !ok && strings.HasPrefix(key, "BAUTA_"):
			if like := nearest(key, slices.Collect(maps.Keys(byEnv))); like != "" {
				c.Warnings = append(c.Warnings, fmt.Sprintf("environment %s: no such option, ignored (did you mean %s?)", key, like))
			}
		case ok && strings.TrimSpace(value) != "":
			s, _ := newSetting(name, "environment "+key)
			l[name] = s.withText(value)
		}
	}
	return l
}

// nodeName is the default of k8s-node-name, from the variable that manifests set
// by the downward API.
func nodeName(environ []string) layer {
	l := make(layer)
	for _, kv := range environ {
		if value, ok := strings.CutPrefix(kv, "K8S_NODE_NAME="); ok && value != "" {
			s, _ := newSetting("k8s-node-name", "environment K8S_NODE_NAME")
			l["k8s-node-name"] = s.withText(value)
		}
	}
	return l
}
