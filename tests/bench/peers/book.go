// The key-value service of "Cloud Native Go", chapter 5, on net/http alone: a map behind a lock, and a log in a file that a
// goroutine of its own writes to and never syncs. It begins with what the log holds.
//
//	book ADDRESS LOG [CERTIFICATE KEY]
package main

import (
	"bufio"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strings"
	"sync"
)

var store = struct {
	sync.RWMutex
	values map[string]string
}{values: make(map[string]string)}

type event struct{ key, value string }

var events = make(chan event, 16)

func main() {
	address, path := os.Args[1], os.Args[2]
	sequence := replay(path)
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		log.Fatal(err)
	}
	go func() {
		for e := range events {
			sequence++
			if _, err := fmt.Fprintf(file, "%d\t%d\t%s\t%s\n", sequence, 2, e.key, e.value); err != nil {
				log.Fatal(err)
			}
		}
	}()
	http.HandleFunc("/v1/", handle)
	if len(os.Args) > 3 {
		log.Fatal(http.ListenAndServeTLS(address, os.Args[3], os.Args[4], nil))
	}
	log.Fatal(http.ListenAndServe(address, nil))
}

// The number of events in the log, which are in the store now.
func replay(path string) uint64 {
	file, err := os.Open(path)
	if err != nil {
		return 0
	}
	defer file.Close()
	lines, count := bufio.NewScanner(file), uint64(0)
	for lines.Scan() {
		fields := strings.SplitN(lines.Text(), "\t", 4)
		store.values[fields[2]] = fields[3]
		count++
	}
	return count
}

func handle(w http.ResponseWriter, r *http.Request) {
	key := strings.TrimPrefix(r.URL.Path, "/v1/")
	switch r.Method {
	case http.MethodPut:
		value, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		store.Lock()
		store.values[key] = string(value)
		store.Unlock()
		events <- event{key, string(value)}
		w.WriteHeader(http.StatusCreated)
	case http.MethodGet:
		store.RLock()
		value, ok := store.values[key]
		store.RUnlock()
		if !ok {
			http.NotFound(w, r)
			return
		}
		io.WriteString(w, value)
	default:
		w.WriteHeader(http.StatusMethodNotAllowed)
	}
}
