CREATE TABLE customer (customer_id INTEGER PRIMARY KEY, name TEXT NOT NULL, city TEXT, age INTEGER);
CREATE TABLE purchase (purchase_id INTEGER PRIMARY KEY, customer_id INTEGER REFERENCES customer, item TEXT, price REAL);
INSERT INTO customer VALUES (1, 'Ann', 'Bern', 31), (2, 'Bob', 'Bern', 45), (3, 'Cleo', 'Rome', 31),
  (4, 'Dora', 'Oslo', NULL), (5, 'Émile', 'Rome', 28);
INSERT INTO purchase VALUES (1, 1, 'tea', 4.5), (2, 1, 'cup', 12), (3, 2, 'tea', 4.5), (4, 3, 'pot', 30.25),
  (5, 5, 'tea', 5), (6, 5, 'pot', 30.25);
