package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	auto        = "auto" // the default, whatever lower sources say
	fromDefault = "default"
)

// setting is one name with its value, as one source gives it.
type setting struct {
	name   string
	kind   Kind
	values []string // of an Enum
	items  []string // not split yet, unless the source had a list
	list   bool     // the source had a list
	source string   // "flag --x", "environment BAUTA_X", "file PATH key x", "directory file PATH"
	dir    bool     // from the directory
	unset  bool     // there, but only to say: the default
}

func (s setting) text() string { return strings.Join(s.items, ",") }

// split returns the items of a list. Blanks and commas separate.
func (s setting) split() []string {
	if s.list {
		return s.items
	}
	return strings.FieldsFunc(s.text(), func(r rune) bool {
		return r == ',' || r == ' ' || r == '\t' || r == '\n' || r == '\r'
	})
}

// fromYAML makes a setting from a decoded value of a YAML file.
func (s setting) fromYAML(value any) (setting, error) {
	list, isList := value.([]any)
	if !isList {
		text, ok := scalar(value)
		if !ok {
			return s, s.misshapen("a mapping")
		}
		s.items = []string{text}
		s.unset = value == nil || text == "" || text == auto
		return s, nil
	}
	if s.kind != List {
		return s, s.misshapen("a list")
	}
	s.list = true
	for i, v := range list {
		text, ok := scalar(v)
		if !ok || text == "" {
			return s, &Error{
				Msg:   fmt.Sprintf("%s[%d] (%s): not a plain value", s.name, i, s.source),
				Hints: []string{"list items are strings or numbers; quote those that begin with ! or *"},
			}
		}
		s.items = append(s.items, text)
	}
	s.unset = len(list) == 0 || len(list) == 1 && s.items[0] == auto
	return s, nil
}

func (s setting) misshapen(shape string) error {
	expected := "one value"
	if s.kind == List {
		expected = "a list"
	}
	return &Error{
		Msg:   fmt.Sprintf("%s (%s): %s, where %s is expected", s.name, s.source, shape, expected),
		Hints: []string{"write " + s.name + ": VALUE"},
	}
}

func scalar(v any) (string, bool) {
	switch v := v.(type) {
	case nil:
		return "", true
	case string:
		return strings.TrimSpace(v), true
	case bool:
		return strconv.FormatBool(v), true
	case json.Number:
		return v.String(), true
	}
	return "", false
}

func (s setting) bool() (bool, error) {
	switch text := strings.ToLower(s.text()); text {
	case "yes", "on":
		return true, nil
	case "no", "off":
		return false, nil
	default:
		v, err := strconv.ParseBool(text)
		if err != nil {
			return false, s.refuse("neither true nor false", "write true or false")
		}
		return v, nil
	}
}

func (s setting) int() (int, error) {
	n, err := strconv.Atoi(s.text())
	switch {
	case errors.Is(err, strconv.ErrRange), err == nil && n > math.MaxInt32:
		return 0, s.refuse("out of bounds", "write a number, for example 65536")
	case err != nil:
		return 0, s.refuse("not a whole number", "write a number, for example 65536")
	}
	return n, nil
}

func (s setting) duration() (time.Duration, error) {
	d, err := time.ParseDuration(s.text())
	switch {
	case err != nil:
		if _, err := strconv.Atoi(s.text()); err == nil {
			return 0, s.refuse("a duration without unit", fmt.Sprintf("write the unit, for example %ss", s.text()))
		}
		return 0, s.refuse("not a duration", "write a number and a unit, for example 90s, 5m or 2h4m")
	case d <= 0:
		return 0, s.refuse("not above zero", "write a duration above zero, for example 90s")
	}
	return d, nil
}

// enum checks the value of an Enum; case does not matter.
func (s setting) enum() (setting, error) {
	text := strings.ToLower(s.text())
	if !slices.Contains(s.values, text) {
		return s, s.refuse("not one of its values", "write one of "+strings.Join(s.values, ", "))
	}
	s.items = []string{text}
	return s, nil
}

// shortDuration prints a duration as a person writes it: 2h4m, not 2h4m0s.
func shortDuration(d time.Duration) string {
	text := d.String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}
